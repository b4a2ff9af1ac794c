// Loads, stages, errors, totals and configuration.

import { amount, byId, fill, repeat, text } from "./dom.js";
import { count, duration, origins, percent, rate, size, sourceName } from "./units.js";

const TOTALS = [
  ["loads_ok", "Loads done", String],
  ["loads_failed", "Loads failed", String],
  ["loads_cancelled", "Loads cancelled", String],
  ["read_bytes", "Read from storage", size],
  ["delivered_bytes", "Delivered", size],
  ["memory_bytes", "Of it from memory", size],
  ["tier_bytes", "Of it from local disk", size],
  ["storage_bytes", "Of it from storage", size],
  ["verified_bytes", "Verified by checksums", size],
  ["stage_hits", "Found in the buffer", String],
  ["stage_misses", "Not found in it", String],
  ["evictions", "Evicted", String],
];
const SHOWN_ERRORS = 8;
const position = (_, index) => index;
const BADGES = { waiting: "waiting", reading: "reading", warm: "warm", on_disk: "waiting", failed: "failed", does_not_fit: "failed" };
const STATE_ORDER = ["reading", "leased", "warm", "waiting", "failed"];

export function showTiles({ readers, staging, loads, stages, totals, tier, hung_mounts: hung }) {
  amount("read-rate", readers.bytes_per_second, rate(readers.bytes_per_second));
  const kept = tier?.read_bytes > 0 ? `, ${size(tier.read_bytes)} of it from local disk` : "";
  const stale = tier?.stale_loads > 0 ? `; ${count(tier.stale_loads, "load")} of stores that could not be asked` : "";
  text(byId("read-total"), `${size(totals.read_bytes)} since the start${kept}${stale}`);
  amount("readers", readers.busy, `${readers.busy} of ${readers.threads}`);
  byId("readers-meter").style.width = `${readers.threads > 0 ? (readers.busy / readers.threads) * 100 : 0}%`;
  const stalled = readers.stalled > 0 ? `${readers.stalled} stalled` : "";
  text(byId("readers-more"), hung.length > 0 ? `${hung.map((mount) => mount.mount_point).join(", ")} hangs` : stalled);
  amount("active", loads.length, String(loads.length));
  text(byId("active-more"), staging.waiting > 0 ? `${staging.waiting} waiting for memory` : "none waits for memory");
  const holders = stages.reduce((sum, stage) => sum + stage.holders.length, 0);
  amount("lease", staging.oldest_lease_seconds, holders > 0 ? duration(staging.oldest_lease_seconds) : "none");
  text(byId("lease-more"), holders > 0 ? `${count(holders, "client")} holding memory` : "no client holds memory");
}

export function showLoads(loads) {
  byId("loads-empty").hidden = loads.length > 0;
  repeat(byId("loads"), "load", loads, (load) => load.load_id, (node, load) => {
    const share = load.total_bytes > 0 ? Math.min(load.delivered_bytes / load.total_bytes, 1) : 0;
    node.dataset.state = load.state;
    node.dataset.delivered = String(load.delivered_bytes);
    fill(node, {
      name: sourceName(load.sources),
      state: load.kind === "load" ? load.state : `${load.kind}, ${load.state}`,
      who: `${who(load)}, for ${duration(load.running_seconds)}, load ${load.load_id}`,
      group: load.group ? `${group(load.group)}, kept waiting by others for ${duration(load.group_waited_seconds)}` : "",
      progress: load.total_bytes > 0 ? `${size(load.delivered_bytes)} of ${size(load.total_bytes)}, ${percent(share)}` : "",
      rate: load.state === "streaming" ? rate(load.bytes_per_second) : "",
      origins: load.kind === "fetch" ? "" : origins(load),
      waits: waits(load),
    });
    node.querySelector("b").title = load.sources.join("\n");
    const progress = node.querySelector("progress");
    progress.value = share;
    progress.setAttribute("aria-label", `Progress of ${sourceName(load.sources)}`);
  });
}

function group({ name, size, joined }) {
  return `Group ${name}: ${joined} of ${count(size, "member")} joined`;
}

function waits(load) {
  if (load.waits_for === "") return "";
  const queue = load.queue_place > 0 ? `, place ${load.queue_place}, for ${duration(load.waited_seconds)} so far` : "";
  return `Waits for ${load.waits_for}${queue}`;
}

export function showWarmSet(warmSet) {
  const given = Boolean(warmSet?.file); // a daemon without one says nothing of it
  byId("warm-card").hidden = !given;
  if (!given) return;
  const { entries, file, problems } = warmSet;
  byId("warm-empty").hidden = entries.length > 0;
  text(byId("warm-more"), file);
  const why = (problem) => `The latest version is not in force: ${problem}`;
  repeat(byId("warm-problems"), "problem", problems, position, (node, problem) => fill(node, { message: why(problem) }));
  repeat(byId("warm"), "wish", entries, (entry) => entry.name, (node, entry) => {
    node.dataset.state = entry.state;
    node.querySelector(".badge").dataset.state = BADGES[entry.state];
    fill(node, {
      name: entry.name,
      state: entry.state.replaceAll("_", " "),
      pinned: entry.pin ? "pinned" : "",
      path: entry.sources.join(", "),
      progress: entry.total_bytes > 0 ? `${size(entry.ready_bytes)} of ${size(entry.total_bytes)}` : "",
      since: `for ${duration(entry.seconds)}`,
      reason: entry.reason,
    });
  });
}

export function showStages(stages) {
  byId("stages-empty").hidden = stages.length > 0;
  byId("stages-table").hidden = stages.length === 0;
  const sorted = [...stages].sort(
    (a, b) => STATE_ORDER.indexOf(a.state) - STATE_ORDER.indexOf(b.state) || a.idle_seconds - b.idle_seconds || a.id - b.id,
  );
  repeat(byId("stages"), "stage", sorted, (stage) => stage.id, (node, stage) => {
    node.id = `stage-${stage.id}`;
    node.dataset.state = stage.state;
    node.querySelector(".badge").dataset.state = stage.state;
    fill(node, {
      name: sourceName(stage.sources),
      path: stage.sources.join(", "),
      state: stage.state,
      pinned: stage.pinned ? "pinned" : "",
      group: stage.group ? group(stage.group) : "",
      size: size(stage.capacity_bytes),
      part: part(stage),
      idle: stage.holders.length > 0 || stage.state === "waiting" ? "" : duration(stage.idle_seconds),
    });
    repeat(node.querySelector(".holders"), "holder", stage.holders, position, (item, holder) => {
      const member = holder.group ? `, of group ${holder.group}` : "";
      text(item, `${who(holder)}, for ${duration(holder.held_seconds)}${member}`);
    });
  });
  text(byId("stages-more"), stages.length > 0 ? count(stages.length, "checkpoint") : "");
}

function part(stage) {
  if (stage.state === "waiting") return "waits for memory";
  const verified = stage.verified_bytes > 0 ? `, ${size(stage.verified_bytes)} verified` : "";
  if (!stage.full) return `a window of ${size(stage.total_bytes)}${verified}`;
  if (stage.ready_bytes < stage.total_bytes) return `${percent(stage.ready_bytes / stage.total_bytes)} of ${size(stage.total_bytes)} read`;
  return `${size(stage.total_bytes)} of tensors${verified}`;
}

function who({ client_name: name, pid, uid }) {
  return name ? `${name} (pid ${pid}, uid ${uid})` : `pid ${pid}, uid ${uid}`;
}

export function showErrors(errors) {
  byId("errors-empty").hidden = errors.length > 0;
  text(byId("errors-more"), errors.length > SHOWN_ERRORS ? `the latest ${SHOWN_ERRORS} of ${errors.length}` : "");
  repeat(byId("errors"), "error", errors.slice(0, SHOWN_ERRORS), position, (node, error) => {
    const about = [sourceName(error.sources), `pid ${error.pid}`, `uid ${error.uid}`];
    if (error.load_id !== "") about.push(`load ${error.load_id}`);
    fill(node, {
      reason: error.reason,
      age: `${duration(error.age_seconds)} ago`,
      message: error.message,
      about: about.join(", "),
    });
  });
}

export function showTotals(totals) {
  const storage = totals.delivered_bytes - totals.memory_bytes - totals.tier_bytes;
  const values = { ...totals, storage_bytes: storage };
  repeat(byId("totals"), "pair", TOTALS, ([name]) => name, (node, [name, label, show]) => {
    const value = values[name];
    node.dataset.value = String(value);
    fill(node, { name: label, value: show(value) });
  });
}

export function showConfiguration(configuration) {
  const pairs = Object.entries(configuration);
  byId("configuration-card").hidden = pairs.length === 0;
  repeat(byId("configuration"), "pair", pairs, ([name]) => name, (node, [name, value]) => {
    fill(node, { name, value });
  });
}
