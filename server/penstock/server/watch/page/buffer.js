// The staging buffer as one bar: a block for every stage, as wide as its share of the limit.

import { amount, byId, fill, repeat, text } from "./dom.js";
import { count, nameOf, percent, size, sourceName } from "./units.js";

const ORDER = ["leased", "reading", "warm", "free", "unmade"];

export function showBuffer({ staging, stages }) {
  const made = staging.free_bytes + staging.reading_bytes + staging.leased_bytes + staging.warm_bytes;
  const held = staging.reading_bytes + staging.leased_bytes;
  // Without a limit the bar shows what exists; a bar of what the machine bears would be empty.
  const limited = staging.limit_bytes !== null && staging.limit_bytes > 0;
  const whole = limited ? Math.max(staging.capacity_bytes, made) : made;

  for (const state of ["leased", "reading", "warm", "free"]) {
    const bytes = staging[`${state}_bytes`];
    amount(state, bytes, size(bytes));
  }
  amount("buffer-held", held, size(held));
  text(byId("buffer-held-of"), limited ? `held of ${size(whole)}, ${percent(held / whole)}` : "held");
  text(byId("buffer-size"), about(staging, limited, made));

  const blocks = [
    ...stages.map(stageBlock),
    emptyBlock("free", staging.free_bytes, "Free"),
    // Less than a slab never is.
    emptyBlock("unmade", whole - made < staging.slab_bytes ? 0 : whole - made, "Not made yet"),
  ].filter((block) => block.bytes > 0);
  blocks.sort((a, b) => ORDER.indexOf(a.state) - ORDER.indexOf(b.state));
  byId("buffer").classList.toggle("nothing", blocks.length === 0);
  repeat(byId("buffer"), "block", blocks, (block) => block.key, (node, block) => update(node, block, whole));
}

function about(staging, limited, made) {
  const slabs = `slabs of ${size(staging.slab_bytes)}`;
  const peak = `at most ${size(staging.peak_bytes)} so far`;
  if (limited) return `limit ${size(staging.limit_bytes)}, ${slabs}, ${staging.populating ? "being populated" : peak}`;
  const limit = staging.limit_bytes === 0 ? "as little as each load needs" : "no limit";
  return `${limit}, ${size(made)} in ${slabs}, ${peak}`;
}

function stageBlock(stage) {
  const share = stage.total_bytes > 0 ? Math.min(stage.ready_bytes / stage.total_bytes, 1) : 1;
  const reading = stage.state === "reading";
  return {
    key: `stage-${stage.id}`,
    href: `#stage-${stage.id}`,
    state: stage.state === "failed" ? "reading" : stage.state,
    bytes: stage.capacity_bytes,
    name: sourceName(stage.sources),
    notes: [holders(stage.holders), stage.pinned ? "pinned" : "", reading ? `${percent(share)} read` : ""],
    pinned: stage.pinned,
    done: reading ? share : 1,
  };
}

function emptyBlock(state, bytes, name) {
  return { key: state, href: "", state, bytes, name, notes: [], pinned: false, done: 1 };
}

function holders(clients) {
  if (clients.length > 1) return count(clients.length, "client");
  return clients.length === 1 ? nameOf(clients[0]) : "";
}

function update(node, block, whole) {
  const share = block.bytes / whole;
  const notes = [size(block.bytes), ...block.notes].filter((note) => note !== "").join(", ");
  node.dataset.state = block.state;
  node.dataset.bytes = String(block.bytes);
  node.classList.toggle("pinned", block.pinned);
  node.style.flexGrow = String(share * 100); // below 1 in all they would not fill the bar
  node.querySelector(".fill").style.width = `${block.done * 100}%`;
  fill(node, { name: block.name, size: notes });
  const state = block.href ? `${block.state}, ` : "";
  const title = `${block.name}: ${state}${notes}, ${percent(share)} of the buffer`;
  if (node.title !== title) node.title = title;
  const link = node.querySelector("a");
  if (block.href && link.getAttribute("href") !== block.href) link.setAttribute("href", block.href);
}
