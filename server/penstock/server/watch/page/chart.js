// Lines over the last minutes: what was read, what was delivered to clients, and how much of that came from memory
// and from the local disk.

import { byId, text } from "./dom.js";
import { duration, rate } from "./units.js";

const LATEST_SECONDS = 5;

export function showChart(throughput) {
  const interval = throughput.interval_seconds;
  const perSecond = (values) => values.map((value) => value / interval);
  const names = ["read", "delivered", "memory", "tier"];
  const lines = Object.fromEntries(names.map((name) => [name, perSecond(throughput[`${name}_bytes`])]));
  const top = niceCeiling(Math.max(0, ...lines.read, ...lines.delivered));
  for (const [name, values] of Object.entries(lines)) {
    byId(`line-${name}`).setAttribute("d", path(values, top));
    text(byId(`chart-${name}`), rate(latest(values, interval)));
  }
  const area = path(lines.read, top);
  byId("area-read").setAttribute("d", area && `${area}V100H0Z`);
  text(byId("chart-top"), top > 0 ? rate(top) : "");
  text(byId("chart-middle"), top > 0 ? rate(top / 2) : "");
  const span = duration(lines.read.length * interval);
  text(byId("chart-from"), lines.read.length > 0 ? `${span} ago` : "");
  const most = (values) => rate(Math.max(0, ...values));
  byId("chart").setAttribute(
    "aria-label",
    `In the last ${span} at most ${most(lines.read)} were read and ${most(lines.delivered)} delivered, ` +
      `${most(lines.memory)} from memory and ${most(lines.tier)} from local disk`,
  );
}

function path(values, top) {
  if (values.length < 2 || top === 0) return values.length < 2 ? "" : "M0 100H100";
  const points = values.map((value, index) => {
    const x = (index / (values.length - 1)) * 100;
    return `${x.toFixed(2)} ${(100 - (value / top) * 100).toFixed(2)}`;
  });
  return `M${points.join("L")}`;
}

function latest(values, interval) {
  const last = values.slice(-Math.max(1, Math.round(LATEST_SECONDS / interval)));
  return last.length > 0 ? last.reduce((sum, value) => sum + value, 0) / last.length : 0;
}

/** The least of 1, 2, 4, 6, 8, 10 times a power of ten that is not less, so that its half is round too. */
function niceCeiling(value) {
  if (value === 0) return 0;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 8, 10].find((step) => step * power >= value) * power;
}
