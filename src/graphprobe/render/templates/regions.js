"use strict";
// The table of every region: sorted by any column, filtered by words and verdict.
(() => {
  const table = document.getElementById("table");
  if (!table) return;
  const SHOWN = [
    ["verdict", "verdict"], ["before", "before"], ["after", "after"], ["op", "operator"], ["module", "module"],
    ["introduced", "introduced"], ["total", "total"], ["exact", "exact"], ["floor", "floor"], ["evidence", "claimed by"],
  ];
  const NUMBERS = new Set(["introduced", "total", "exact", "floor"]);
  const PAGE = 200;
  const filter = document.getElementById("filter"), kind = document.getElementById("kind");
  const more = document.getElementById("more"), matches = document.getElementById("matches");
  let sorted = "verdict", down = true, all = false, chosen = null;

  function rank(region, column) {
    if (column === "verdict") return DATA.verdicts.indexOf(region.verdict) * 1e6 + Math.min(size(region.introduced), 1e5);
    return NUMBERS.has(column) ? size(region[column]) : region[column];
  }
  const size = (value) => (value === null || value === undefined ? -1 : Number.isNaN(value) ? Infinity : value);

  function compare(a, b) {
    const [x, y] = [rank(a, sorted), rank(b, sorted)];
    const order = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x === y ? 0 : x < y ? -1 : 1;
    return (down ? -order : order) || a.index - b.index;
  }

  function wanted() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    return REGIONS.filter((region) => {
      if (kind.value && region.verdict !== kind.value) return false;
      const text = [region.before, region.after, region.op, region.module, region.evidence, region.rule].join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    }).sort(compare);
  }

  function cell(region, column) {
    if (column === "verdict") {
      const chip = make("span", { class: `chip v-${region.verdict}`, title: region.rule }, `${DATA.signs[region.verdict] || ""} ${region.verdict}`);
      return make("td", {}, chip);
    }
    if (NUMBERS.has(column)) return make("td", { class: "num" }, errorText(region[column]));
    if (column === "after") {
      const link = make("button", { type: "button", class: "link", onclick: () => choose(region.after, "table") }, region.after);
      return make("td", { class: "name", title: region.after }, link);
    }
    // long paths break behind their dots, names of operations not at all
    if (column === "before") return make("td", { class: "name", title: region.before }, make("code", {}, region[column]));
    const words = String(region[column]).split(/(?<=[._])/);
    return make("td", {}, make("code", {}, ...words.flatMap((word) => [word, make("wbr")])));
  }

  function draw() {
    const rows = wanted();
    const body = rows.slice(0, all ? rows.length : PAGE).map((region) =>
      make("tr", { "data-after": region.after, class: region.after === chosen ? "on" : null }, ...SHOWN.map(([column]) => cell(region, column))));
    table.tBodies[0].replaceChildren(...body);
    matches.textContent = `${rows.length} of ${REGIONS.length} regions`;
    more.hidden = all || rows.length <= PAGE;
    for (const head of table.tHead.rows[0].cells) {
      const mine = head.dataset.column === sorted;
      head.setAttribute("aria-sort", mine ? (down ? "descending" : "ascending") : "none");
      head.querySelector("span").textContent = mine ? (down ? " \u25be" : " \u25b4") : "";
    }
  }

  function sortBy(column) {
    down = column === sorted ? !down : NUMBERS.has(column) || column === "verdict";
    sorted = column;
    draw();
  }

  table.tHead.append(make("tr", {}, ...SHOWN.map(([column, title]) =>
    make("th", { scope: "col", "data-column": column, class: NUMBERS.has(column) ? "num" : null }, make("button", { type: "button", onclick: () => sortBy(column) }, title, make("span", {}))))));
  for (const verdict of DATA.verdicts.filter((v) => REGIONS.some((region) => region.verdict === v))) {
    kind.append(make("option", { value: verdict }, verdict));
  }
  filter.addEventListener("input", draw);
  kind.addEventListener("change", draw);
  more.addEventListener("click", () => { all = true; draw(); });
  onChoice((name) => {
    chosen = name;
    const find = () => [...table.tBodies[0].rows].find((row) => row.dataset.after === name);
    if (!find() && byAfter.has(name)) { all = true; draw(); }
    for (const row of table.tBodies[0].rows) row.classList.toggle("on", row.dataset.after === name);
    const row = find();
    // only the table scrolls: the page stays where the choice was made, or goes to the graphs
    if (row) table.parentElement.scrollTop = row.offsetTop - table.parentElement.clientHeight / 2;
  });
  draw();
})();
