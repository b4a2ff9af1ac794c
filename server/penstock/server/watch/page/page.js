// Asks the daemon for its status every second and draws it. Stops while nobody looks; asks less and less often
// while nobody answers, and says since when.

import { showBuffer } from "./buffer.js";
import { showChart } from "./chart.js";
import { byId, text } from "./dom.js";
import { showConfiguration, showErrors, showLoads, showStages, showTiles, showTotals, showWarmSet } from "./lists.js";
import { duration } from "./units.js";

const INTERVAL_SECONDS = 1;
const LONGEST_INTERVAL_SECONDS = 15;
const ANSWER_SECONDS = 5;

let answered = null; // when the daemon last told its status
let failures = 0;
let trouble = "";
let timer = 0;
let asking = false;

async function poll() {
  if (asking || document.hidden) return;
  clearTimeout(timer);
  asking = true;
  try {
    const response = await fetch("status", { cache: "no-store", signal: AbortSignal.timeout(ANSWER_SECONDS * 1000) });
    const status = await response.json();
    if (!response.ok) throw new Error(status.error);
    show(status);
    answered = new Date();
    failures = 0;
  } catch (error) {
    failures += 1;
    trouble = error instanceof Error ? error.message : String(error);
  }
  asking = false;
  showAge();
  if (!document.hidden) {
    const seconds = Math.min(INTERVAL_SECONDS * 2 ** Math.max(failures - 1, 0), LONGEST_INTERVAL_SECONDS);
    timer = setTimeout(poll, seconds * 1000);
  }
}

function show(status) {
  const name = [status.host, status.version && `penstockd ${status.version}`, `pid ${status.pid}`];
  text(byId("daemon"), `${name.filter(Boolean).join(", ")}, up for ${duration(status.uptime_seconds)}`);
  document.title = status.host ? `Penstock on ${status.host}` : "Penstock";
  showHealth(status.health);
  showBuffer(status);
  showTiles(status);
  showChart(status.throughput);
  showLoads(status.loads);
  showWarmSet(status.warm_set);
  showStages(status.stages);
  showErrors(status.errors);
  showTotals(status.totals);
  showConfiguration(status.configuration);
}

function showHealth({ live, ready, reason: why }) {
  const health = byId("health");
  health.dataset.health = ready ? "ready" : live ? "waiting" : "stalled";
  const word = ready ? "Ready" : live ? "Not ready" : "Stalled";
  text(health, ready || why === "" ? word : `${word}: ${why}`);
}

/** Says how old what is shown is, and loudly when it is old. */
function showAge() {
  const stale = failures > 0;
  document.body.classList.toggle("stale", stale);
  byId("notice").hidden = !stale;
  const time = answered === null ? "" : answered.toLocaleTimeString();
  if (time !== "") text(byId("updated"), time);
  if (!stale) return;
  byId("health").dataset.health = "unknown";
  text(byId("health"), "No answer");
  const since = time === "" ? "." : ` since ${time}. What you see is from then.`;
  text(byId("notice"), `The daemon has not told its status${since} (${trouble})`);
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) poll();
});
poll();
