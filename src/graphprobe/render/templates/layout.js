"use strict";
// A layered layout of nested boxes: every unfolded module is laid out by itself and then stands as one box in its parent.
const GAP = { x: 18, y: 26, pad: 12, head: 20 };

// Give each item of a container its row: below everything it takes values from. Folded modules may feed each other in
// both directions, so an edge counts only from the item that comes first in the graph.
function rows(items, edges) {
  const row = new Map(items.map((item) => [item, 0]));
  const into = new Map(items.map((item) => [item, []]));
  for (const [tail, head] of edges) if (tail.first < head.first) into.get(head).push(tail);
  for (const item of [...items].sort((a, b) => a.first - b.first)) {
    for (const tail of into.get(item)) row.set(item, Math.max(row.get(item), row.get(tail) + 1));
  }
  const out = [];
  for (const item of items) (out[row.get(item)] ||= []).push(item);
  return { table: out, into };
}

// Two sweeps by the mean place of neighbours keep most edges from crossing.
function order(table, into, edges) {
  const from = new Map();
  for (const [tail, head] of edges) if (tail.first < head.first) from.set(tail, [...(from.get(tail) || []), head]);
  const place = new Map();
  const number = (row) => row.forEach((item, index) => place.set(item, index - row.length / 2));
  table.forEach(number);
  const mean = (items) => items.reduce((sum, item) => sum + place.get(item), 0) / items.length;
  const sort = (row, near) => {
    const key = new Map(row.map((item) => [item, near(item).length ? mean(near(item)) : place.get(item)]));
    row.sort((a, b) => key.get(a) - key.get(b) || a.first - b.first);
    number(row);
  };
  for (let sweep = 0; sweep < 2; sweep += 1) {
    for (const row of table) sort(row, (item) => into.get(item) || []);
    for (const row of [...table].reverse()) sort(row, (item) => from.get(item) || []);
  }
}

// Place the items of one container; each gets x and y relative to it, the container its width and height.
function arrange(container, edges) {
  const { table, into } = rows(container.items, edges);
  order(table, into, edges);
  const widths = table.map((row) => row.reduce((sum, item) => sum + item.width + GAP.x, -GAP.x));
  const width = Math.max(...widths, container.least || 0);
  let y = GAP.pad + (container.title ? GAP.head : 0);
  table.forEach((row, index) => {
    let x = GAP.pad + (width - widths[index]) / 2;
    for (const item of row) { item.x = x; item.y = y; x += item.width + GAP.x; }
    y += Math.max(...row.map((item) => item.height)) + GAP.y;
  });
  container.width = width + 2 * GAP.pad;
  container.height = y - GAP.y + GAP.pad;
}
