// Numbers as people read them. Sizes are decimal, as `penstock status` and the daemon's messages have them.

const NBSP = "\u00a0"; // between a number and its unit
const SIZES = ["kB", "MB", "GB", "TB"];

export function size(bytes) {
  if (bytes < 999.95) return `${Math.round(bytes)}${NBSP}B`;
  let unit = -1;
  while (bytes >= 999.95 && unit < SIZES.length - 1) {
    bytes /= 1000;
    unit += 1;
  }
  return `${bytes.toFixed(1)}${NBSP}${SIZES[unit]}`;
}

export const rate = (bytesPerSecond) => `${size(bytesPerSecond)}/s`;

export const percent = (share) => `${Math.floor(share * 100)}${NBSP}%`;

/** The two largest units: `8 s`, `3 min 20 s`, `2 h 5 min`, `4 d 1 h`. */
export function duration(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const parts = [
    [Math.floor(whole / 86400), "d"],
    [Math.floor(whole / 3600) % 24, "h"],
    [Math.floor(whole / 60) % 60, "min"],
    [whole % 60, "s"],
  ];
  const first = parts.findIndex(([number]) => number > 0);
  if (first < 0) return `0${NBSP}s`;
  return parts
    .slice(first, first + 2)
    .filter(([number]) => number > 0)
    .map(([number, unit]) => `${number}${NBSP}${unit}`)
    .join(" ");
}

export const count = (number, one, many = `${one}s`) => `${number} ${number === 1 ? one : many}`;

/** What to call a checkpoint: the last part of its first source. */
export function sourceName(sources) {
  if (sources.length === 0) return "unnamed";
  const last = sources[0].replace(/\/+$/, "").split("/").pop();
  const name = last.replace(/\.safetensors$/, "") || sources[0];
  return sources.length > 1 ? `${name} and ${sources.length - 1} more` : name;
}

/** Where so many delivered bytes came from, in words; what is neither of memory nor of the tier is of storage. */
export function origins({ delivered_bytes: delivered, memory_bytes: memory = 0, tier_bytes: tier = 0 }) {
  const storage = delivered - memory - tier;
  const parts = [[memory, "memory"], [tier, "local disk"], [storage, "storage"]];
  return parts.filter(([bytes]) => bytes > 0).map(([bytes, origin]) => `${size(bytes)} from ${origin}`).join(", ");
}

export const nameOf = (client) => client.client_name || `pid ${client.pid}`;
