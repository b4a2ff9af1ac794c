// Changes the document only where something changed, so that focus, selection and scrolling survive an update.
// What clients chose gets into the page through `text` alone, never as markup.

export const byId = (id) => document.getElementById(id);

export function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

/** Writes each value into the child that names it in data-field. */
export function fill(node, values) {
  for (const [name, value] of Object.entries(values)) {
    const target = node.dataset.field === name ? node : node.querySelector(`[data-field="${name}"]`);
    text(target, value);
  }
}

/** A text with the exact number it stands for, which tools and tests read from data-value. */
export function amount(id, value, shown) {
  const node = byId(id);
  node.dataset.value = String(value);
  text(node, shown);
}

/** Makes the children of `parent` one copy of the template for each item, in order; copies are kept by key. */
export function repeat(parent, template, items, key, update) {
  const kept = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let next = parent.firstElementChild;
  for (const [index, item] of items.entries()) {
    const name = String(key(item, index));
    let child = kept.get(name);
    kept.delete(name);
    if (child === undefined) {
      child = byId(template).content.firstElementChild.cloneNode(true);
      child.dataset.key = name;
    }
    if (child === next) next = next.nextElementSibling;
    else parent.insertBefore(child, next);
    update(child, item);
  }
  for (const child of kept.values()) child.remove();
}
