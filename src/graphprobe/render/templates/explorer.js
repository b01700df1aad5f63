"use strict";
// Both graphs as nested boxes: modules unfold one by one, choosing an operation marks its partner on the other side.
const mates = { before: new Map(DATA.claims), after: new Map(DATA.claims.map(([before, after]) => [after, before])) };
const culprits = new Set(DATA.culprits);
const RUN = 80; // operations of one module that are shown at once
const LOOSE = 12; // so many operations beside the parts of a large module need no fold of their own
const LARGE = 250;
const MANY = 8; // a value that goes to more boxes than this is drawn only when it is chosen

class Explorer {
  constructor(side) {
    this.side = side;
    this.host = document.getElementById(`graph-${side}`);
    this.nodes = DATA.sides[side].nodes.map((row, index) => ({
      index, name: row[0], title: row[1], shape: row[2], weights: row[3], path: row[4], role: row[5], inputs: row[6],
      missing: row[7], call: row[8], source: row[9],
    }));
    this.byName = new Map(this.nodes.map((node) => [node.name, node]));
    this.root = this.tree();
    this.open = new Set([""]);
    this.unfoldSome();
    this.chosen = null;
    this.zoom = 1;
    this.draw();
    this.listen();
  }

  // The claim of an operation, else that of the nearest operation below or above it: [what is claimed, its partner].
  claim(name) {
    const known = mates[this.side];
    const closed = Object.hasOwn(DATA.closed, name) ? DATA.closed[name] : null;
    if (!known.has(name) && closed && closed[0] && closed[1]) return this.side === "before" ? closed : [closed[1], closed[0]];
    if (known.has(name) || !this.byName.has(name)) return [name, known.get(name)];
    if (!this.users) {
      this.users = this.nodes.map(() => []);
      for (const node of this.nodes) for (const source of node.inputs) this.users[source].push(node.index);
    }
    for (const step of [(index) => this.users[index], (index) => this.nodes[index].inputs]) {
      const start = this.byName.get(name).index, seen = new Set([start]), todo = [start];
      for (let at = 0; at < todo.length && at < 60; at++) {
        for (const next of step(todo[at])) {
          if (known.has(this.nodes[next].name)) return [this.nodes[next].name, known.get(this.nodes[next].name)];
          if (!seen.has(next)) { seen.add(next); todo.push(next); }
        }
      }
    }
    return [name, undefined];
  }

  tree() {
    const root = { id: "", title: "", parts: new Map(), own: [], parent: null };
    for (const node of this.nodes) {
      let here = root, path = "";
      for (const part of node.path ? node.path.split(".") : []) {
        path = path ? `${path}.${part}` : part;
        if (!here.parts.has(part)) here.parts.set(part, { id: path, title: /^\d+$/.test(part) ? `${here.title}.${part}` : part, parts: new Map(), own: [], parent: here });
        here = here.parts.get(part);
      }
      here.own.push(node);
      node.parent = here;
    }
    this.split(root);
    return root;
  }

  size(module) {
    return [...module.parts.values()].reduce((sum, part) => sum + this.size(part), module.own.length);
  }

  // A module with many operations of its own shows them in runs.
  split(module) {
    const ends = module.own.filter((node) => node.role === "input" || node.role === "output");
    const own = module.own.filter((node) => !ends.includes(node));
    if (own.length > (module.parts.size && this.size(module) > LARGE ? LOOSE : RUN)) {
      const size = Math.max(RUN, Math.ceil(own.length / 40));
      for (let start = 0; start < own.length; start += size) {
        const part = own.slice(start, start + size);
        const title = `${part[0].name} \u2026 ${part.at(-1).name}`;
        const run = { id: `${module.id}#${start}`, title, parts: new Map(), own: part, parent: module };
        for (const node of part) node.parent = run;
        module.parts.set(run.id, run);
      }
      module.own = ends;
    }
    for (const part of module.parts.values()) {
      if (part.id.includes("#")) { part.all = part.own; part.first = part.own[0].index; } else this.split(part);
    }
    module.all = [...module.own, ...[...module.parts.values()].flatMap((part) => part.all)];
    module.first = Math.min(...module.all.map((node) => node.index));
  }

  // Start with few boxes, but not with a single one: unfold the largest module while it leaves room.
  unfoldSome() {
    let here = this.root;
    for (let room = 48; here && room > 0; room -= here ? here.parts.size + here.own.length : 0) {
      this.open.add(here.id);
      const parts = [...here.parts.values()].filter((part) => part.parts && part.parts.size > 1);
      here = parts.length === 1 ? parts[0] : null;
    }
  }

  box(node) {
    const lines = [node.title, node.weights, node.shape].filter(Boolean);
    const width = Math.max(44, ...lines.map((line, i) => line.length * (i ? 5.3 : 6.6) + 16));
    return { node, lines, first: node.index, width, height: 8 + 14 * lines.length };
  }

  folded(module) {
    const kind = DATA.sides[this.side].kinds[module.id] || "";
    const lines = [module.title, kind, `${module.all.length} operations`].filter(Boolean);
    return { module, lines, first: module.first, width: Math.max(...lines.map((line) => line.length * 6.6 + 20)), height: 8 + 14 * lines.length };
  }

  // Build boxes for what is unfolded, then let each container lay out its own.
  build(module) {
    const items = [...module.own.map((node) => this.box(node))];
    for (const part of module.parts.values()) {
      if (part.all.length === 1) items.push(this.box(part.all[0]));
      else items.push(this.open.has(part.id) ? this.build(part) : this.folded(part));
    }
    const kind = DATA.sides[this.side].kinds[module.id] || "";
    const title = module.id ? `${module.title}  ${kind}` : "";
    const container = { module, title, items, first: module.first, least: title.length * 6.8 };
    for (const item of items) item.parent = container;
    arrange(container, this.edges(container));
    return container;
  }

  edges(container) {
    const owner = new Map();
    for (const item of container.items) {
      for (const node of item.node ? [item.node] : item.module.all) owner.set(node.index, item);
    }
    const found = new Map();
    for (const [index, head] of owner) {
      for (const source of this.nodes[index].inputs) {
        const tail = owner.get(source);
        if (tail && tail !== head) found.set(`${tail.first}>${head.first}`, [tail, head]);
      }
    }
    return [...found.values()];
  }

  draw() {
    const top = this.build(this.root);
    const svg = make("svg", { width: top.width * this.zoom, height: top.height * this.zoom, viewBox: `0 0 ${top.width} ${top.height}` });
    this.leaf = new Map();
    const boxes = make("g");
    this.paint(top, 0, 0, boxes);
    svg.append(this.lines(), boxes);
    this.host.replaceChildren(svg);
    this.mark();
  }

  paint(container, x, y, into) {
    container.at = [x, y];
    if (container.title) {
      into.append(make("g", { class: "frame box", tabindex: 0, role: "button", "aria-expanded": "true", "aria-label": `fold ${container.module.id}`, "data-id": container.module.id },
        make("rect", { x, y, width: container.width, height: container.height, rx: 6, "pointer-events": "all" }),
        make("text", { x: x + 10, y: y + 16 }, container.title)));
    }
    for (const item of container.items) {
      if (item.items) this.paint(item, x + item.x, y + item.y, into);
      else this.paintBox(item, x + item.x, y + item.y, into);
    }
  }

  paintBox(item, x, y, into) {
    item.at = [x, y];
    for (const node of item.node ? [item.node] : item.module.all) this.leaf.set(node.index, item);
    const [fill, stroke] = this.colours(item);
    const id = item.node ? item.node.name : item.module.id;
    const label = item.node ? `${item.lines.join(", ")}, ${item.node.name}` : `unfold ${item.module.id}: ${item.lines.join(", ")}`;
    const group = make("g", { class: "box", tabindex: 0, role: "button", "aria-label": label, "data-id": id, "data-op": item.node ? "1" : null, "aria-expanded": item.node ? null : "false" },
      make("rect", { x, y, width: item.width, height: item.height, rx: 5, fill, stroke, "stroke-width": item.node && culprits.has(item.node.name) ? 3 : 1 }),
      make("title", {}, item.node ? `${item.node.name}\n${item.node.call}\n${item.node.path}\n${item.node.source}` : item.module.id));
    item.lines.forEach((line, i) => group.append(make("text", { x: x + item.width / 2, y: y + 16 + 14 * i, "text-anchor": "middle", class: i ? "small" : "title" }, line)));
    item.element = group;
    into.append(group);
  }

  region(node) { return (this.side === "after" ? byAfter : byBefore).get(node.name); }

  colours(item) {
    const nodes = item.node ? [item.node] : item.module.all;
    if (nodes.some((node) => node.missing)) return [DATA.missing, "#b00020"];
    let worst = null;
    for (const node of nodes) {
      const region = this.region(node);
      if (region && !["identical", "rounding"].includes(region.verdict) && (!worst || !(region.introduced <= worst.introduced))) worst = region;
    }
    if (worst) return [worst.heat, "#7f2704"];
    return item.node ? DATA.roles[item.node.role] : ["#e9eef5", "#5b7ea6"];
  }

  lines() {
    const group = make("g");
    const drawn = new Map(), fan = new Map();
    for (const [index, head] of this.leaf) {
      for (const source of this.nodes[index].inputs) {
        const tail = this.leaf.get(source);
        if (!tail || tail === head) continue;
        const key = `${tail.first}>${head.first}`;
        if (!drawn.has(key)) { drawn.set(key, [tail, head]); fan.set(tail, (fan.get(tail) || 0) + 1); }
      }
    }
    this.paths = [...drawn.values()].map(([tail, head]) => {
      const [x1, y1] = [tail.at[0] + tail.width / 2, tail.at[1] + tail.height];
      const [x2, y2] = [head.at[0] + head.width / 2, head.at[1]];
      const bend = Math.max(14, Math.abs(y2 - y1) / 2.5);
      const path = make("path", { class: `edge${fan.get(tail) > MANY ? " far" : ""}`, d: `M${x1} ${y1}C${x1} ${y1 + bend} ${x2} ${y2 - bend} ${x2} ${y2}` });
      group.append(path);
      return { tail, head, path };
    });
    return group;
  }

  mark() {
    const item = this.chosen && this.byName.has(this.chosen) ? this.leaf.get(this.byName.get(this.chosen).index) : null;
    for (const { tail, head, path } of this.paths) path.classList.toggle("hot", Boolean(item) && (tail === item || head === item));
    for (const box of new Set(this.leaf.values())) {
      box.element.classList.toggle("on", box === item && !this.asMate);
      box.element.classList.toggle("mate", box === item && this.asMate);
    }
    return item;
  }

  // Unfold what hides an operation, mark it, and bring it into view.
  show(name, asMate) {
    this.chosen = name;
    this.asMate = asMate;
    const node = this.byName.get(name);
    if (!node) { this.mark(); return; }
    for (let module = node.parent; module; module = module.parent) this.open.add(module.id);
    this.draw();
    const item = this.leaf.get(node.index);
    this.host.scrollTo({ left: item.at[0] * this.zoom - this.host.clientWidth / 2 + 60, top: item.at[1] * this.zoom - this.host.clientHeight / 2 });
  }

  toggle(id) {
    if (this.open.has(id)) this.open.delete(id); else this.open.add(id);
    this.draw();
  }

  foldAll() {
    this.open = new Set([""]);
    this.unfoldSome();
    this.chosen = null;
    this.scale(1 / this.zoom);
    this.host.scrollTo(0, 0);
  }

  scale(factor) {
    this.zoom = Math.min(2.5, Math.max(0.15, this.zoom * factor));
    this.draw();
  }

  act(target) {
    const box = target.closest(".box");
    if (!box) return;
    const id = box.dataset.id;
    if (box.dataset.op) choose(id, this.side);
    else {
      this.toggle(id);
      const again = [...this.host.querySelectorAll(".box")].find((element) => element.dataset.id === id);
      if (again) again.focus({ preventScroll: true });
    }
  }

  listen() {
    let grip = null, moved = false;
    this.host.addEventListener("click", (event) => { if (!moved) this.act(event.target); });
    this.host.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); this.act(event.target); }
      if (event.key === "+" || event.key === "-") this.scale(event.key === "+" ? 1.2 : 1 / 1.2);
    });
    this.host.addEventListener("pointerdown", (event) => {
      grip = [event.clientX, event.clientY, this.host.scrollLeft, this.host.scrollTop]; moved = false;
    });
    this.host.addEventListener("pointermove", (event) => {
      if (!grip || !event.buttons) { grip = null; return; }
      const [dx, dy] = [event.clientX - grip[0], event.clientY - grip[1]];
      if (Math.abs(dx) + Math.abs(dy) > 4) { moved = true; this.host.scrollTo(grip[2] - dx, grip[3] - dy); }
    });
    this.host.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      this.scale(event.deltaY > 0 ? 0.9 : 1.1);
    }, { passive: false });
  }
}

(() => {
  const sides = { before: new Explorer("before"), after: new Explorer("after") };
  const detail = document.getElementById("detail");
  onChoice((name, from) => {
    if (!["before", "after", "find"].includes(from)) document.getElementById("explorer").scrollIntoView();
    const side = from === "before" || (!sides.after.byName.has(name) && sides.before.byName.has(name)) ? "before" : "after";
    const other = side === "after" ? "before" : "after";
    const [claimed, mate] = sides[side].claim(name);
    sides[side].show(name, false);
    sides[other].show(mate || null, true);
    const node = sides[side].byName.get(name);
    if (!node) return;
    const region = sides[side].region(node);
    const judged = region ? ` ${region.verdict}: introduced ${errorText(region.introduced)}, total ${errorText(region.total)}, exact ${errorText(region.exact)}, floor ${errorText(region.floor)}.` : "";
    detail.textContent = `${side} ${node.name}: ${node.call} ${node.shape}${node.path ? ` in ${node.path}` : ""}${node.source ? `, ${node.source}` : ""}.`
      + `${judged} ${!mate ? "No claim." : claimed === name ? `Claimed to equal ${mate} of ${other}.` : `No claim of its own; ${claimed} is claimed to equal ${mate} of ${other}.`}`;
  });
  document.getElementById("fold").addEventListener("click", () => { sides.before.foldAll(); sides.after.foldAll(); });
  const find = document.getElementById("find"), known = document.getElementById("known");
  const culprit = DATA.culprits[0];
  if (culprit) {
    const side = sides.after.byName.has(culprit) ? "after" : "before", other = side === "after" ? "before" : "after";
    sides[side].show(culprit, false);
    sides[other].show(sides[side].claim(culprit)[1], true);
  }
  known.append(...sides.after.nodes.slice(0, 4000).map((node) => make("option", { value: node.name })));
  find.addEventListener("change", () => {
    const text = find.value.trim();
    const all = [...sides.after.nodes, ...sides.before.nodes];
    const hit = all.find((node) => node.name === text) || all.find((node) => node.path === text) || all.find((node) => text && `${node.path}/${node.name}`.includes(text));
    if (hit) choose(hit.name, "find");
    else detail.textContent = text ? `Nothing is called ${text}.` : "";
  });
})();
