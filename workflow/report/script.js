"use strict";
// Optional: sorting, filtering, saving, and the origin of a number. The page is complete without it.

const element = (tag, properties, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

const save = (name, content, type) => {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
};

// Tables: a click on a head sorts by its column, the best first. Empty cells stay last.
const origins = JSON.parse(document.getElementById("origins").textContent);
const numbersOf = (cell) => (cell.dataset.n ?? "").split(" ").filter(Boolean).map((place) => origins.numbers[place]);
const sortValue = (cell) => cell?.dataset.sort ?? numbersOf(cell ?? document.body)[0]?.[0] ?? cell?.textContent.trim() ?? "";

const makeSortable = (table) => {
  const heads = [...table.tHead.rows[0].cells];
  if (table.tHead.rows.length > 1) return;
  const isLower = (head) => (/[↑↓]/.exec(head.textContent) ?? /[↑↓]/.exec(table.caption.textContent) ?? [""])[0] === "↓";
  const sort = (index) => {
    const head = heads[index];
    const first = isLower(head) || !head.classList.contains("number") ? "ascending" : "descending";
    const second = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? second : first;
    const sign = order === "ascending" ? 1 : -1;
    const compare = (a, b) => {
      const [x, y] = [sortValue(a.cells[index]), sortValue(b.cells[index])];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (isNaN(x) || isNaN(y) ? String(x).localeCompare(y, "en", { numeric: true }) : x - y);
    };
    heads.forEach((other) => other.setAttribute("aria-sort", other === head ? order : "none"));
    table.classList.add("sorted");
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter((row) => !row.classList.contains("block"));
      body.append(...rows.sort(compare));
    }
  };
  heads.forEach((head, index) => {
    const button = element("button", { type: "button" }, ...head.childNodes);
    button.addEventListener("click", () => sort(index));
    head.append(button);
    head.setAttribute("aria-sort", "none");
  });
};

// A table as CSV: its text as shown, and the first number of a cell with all its digits.
const csv = (table) => {
  const quoted = (text) => `"${String(text).replaceAll('"', '""')}"`;
  const text = (cell) => cell.innerText.trim().replace(/\s*\n\s*/g, "; ");
  const lines = [...table.rows].map((row) =>
    [...row.cells].flatMap((cell) => {
      const span = cell.colSpan > 1 ? Array(cell.colSpan - 1).fill('""') : [];
      return [quoted(text(cell)), ...span];
    }).join(","));
  return lines.join("\r\n") + "\r\n";
};

const fileName = (part, kind) => `${part.textContent.trim().replace(/\W+/g, "-").slice(0, 40).replace(/-$/, "").toLowerCase()}.${kind}`;
const LONG = 8; // rows, from which a table can be filtered

const addTools = (table) => {
  const tools = element("div", { className: "tools" });
  const rows = [...table.tBodies].flatMap((body) => [...body.rows]).filter((row) => !row.classList.contains("block"));
  if (rows.length > LONG) {
    const input = element("input", { type: "search", autocomplete: "off" });
    const output = element("output", { ariaLive: "polite" });
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
      table.classList.toggle("filtered", words.length > 0);
      output.textContent = words.length ? `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows` : "";
    });
    tools.append(element("label", {}, "Filter ", input), output);
  }
  const button = element("button", { type: "button" }, "Save as CSV");
  button.addEventListener("click", () => save(fileName(table.caption, "csv"), csv(table), "text/csv"));
  tools.append(button);
  table.closest(".scroll").before(tools);
};

// Figures: each drawing as SVG or PNG, with the page's colors in it.
const SCALE = 3; // pixels of a PNG for each unit of the drawing
const standalone = (svg) => {
  const style = getComputedStyle(document.documentElement);
  const copy = svg.cloneNode(true);
  const [, , width, height] = svg.getAttribute("viewBox").split(" ");
  for (const [name, value] of Object.entries({ xmlns: "http://www.w3.org/2000/svg", width, height })) copy.setAttribute(name, value);
  const paper = style.getPropertyValue("--paper");
  const text = `text { font-family: ${style.getPropertyValue("--sans")}; paint-order: stroke; stroke: ${paper}; stroke-width: 4px }`;
  const isDots = svg.closest(".dots"); // the page's rules color it
  const drawn = isDots ? [...document.styleSheets[0].cssRules].filter((rule) => rule.selectorText?.startsWith(".dots ")) : [];
  if (isDots) copy.classList.add("dots");
  const rules = document.createElementNS("http://www.w3.org/2000/svg", "style");
  rules.textContent = [text, ...drawn.map((rule) => rule.cssText)].join("\n");
  copy.prepend(rules);
  copy.style.cssText = `background: ${paper}; color: ${getComputedStyle(svg).color}; overflow: visible`;
  const written = new XMLSerializer().serializeToString(copy);
  return written.replace(/var\((--[\w-]+)\)/g, (_, name) => style.getPropertyValue(name).trim());
};

const savePng = async (svg, name) => {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(standalone(svg))}`;
  await image.decode();
  const canvas = element("canvas", { width: image.width * SCALE, height: image.height * SCALE });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  canvas.toBlob((blob) => save(name, blob));
};

const addSaves = (panel) => {
  const [svg, title] = [panel.querySelector("svg"), panel.querySelector(".panel-title")];
  const button = (kind, act) => {
    const made = element("button", { type: "button", ariaLabel: `Save “${title.textContent}” as ${kind.toUpperCase()}` }, kind.toUpperCase());
    made.addEventListener("click", () => act(fileName(title, kind)));
    return made;
  };
  panel.prepend(
    element("div", { className: "tools" },
      button("svg", (name) => save(name, standalone(svg), "image/svg+xml")),
      button("png", (name) => savePng(svg, name))));
};

// What is in closed details gets its tools when they are opened.
const equip = () => {
  for (const part of document.querySelectorAll(".scroll > table:not(.equipped), .panel:not(.equipped)")) {
    if (part.closest("details:not([open])")) continue;
    part.classList.add("equipped");
    if (part.matches("table")) {
      makeSortable(part);
      addTools(part);
      enterNumbers(part);
    } else addSaves(part);
  }
};

// The origin of a number, by click or by keyboard: Tab reaches a table's or a section's numbers, the arrow keys go
// from one to the next, Enter opens.
const box = element("div", { popover: "auto", className: "origin" });
document.body.append(box);
const NUMBERS = "td[data-n], data[data-key]";

const lines = (value, key, path, stage, md5) => [
  ["Value", value], ["Key", key], ["File", path],
  ...(stage ? [["Stage", stage], ["md5", md5], ["Reproduce with", `dvc repro ${stage}`]] : []),
];

const originsOf = (number) => {
  if (number.matches("td")) return numbersOf(number).map(([value, file, key]) => [value, key, ...origins.files[file]]);
  const [path, key] = number.dataset.key.split("#");
  return [[number.value, key, ...(origins.files.find((file) => file[0] === path) ?? [path])]];
};

const showOrigin = (number) => {
  const list = element("dl", {});
  for (const origin of originsOf(number))
    for (const [name, text] of lines(...origin)) list.append(element("dt", {}, name), element("dd", {}, String(text)));
  box.replaceChildren(list);
  box.showPopover();
};

const enterNumbers = (part) => part.querySelector(NUMBERS)?.setAttribute("tabindex", "0");
const groupOf = (number) => number.closest("table") ?? number.closest("header, section");

document.addEventListener("click", (event) => {
  const number = event.target.closest(NUMBERS);
  if (number && !event.target.closest("button, summary, a")) showOrigin(number);
});
document.addEventListener("keydown", (event) => {
  const number = event.target.matches(NUMBERS) && event.target;
  if (!number) return;
  const group = [...groupOf(number).querySelectorAll(NUMBERS)].filter((other) => other.checkVisibility());
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (step) {
    const next = group[group.indexOf(number) + step];
    if (next) {
      number.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
    }
  } else if (event.key === "Enter" || event.key === " ") showOrigin(number);
  else return;
  event.preventDefault();
});

for (const part of document.querySelectorAll("header, section")) part.querySelector("data[data-key]")?.setAttribute("tabindex", "0");
document.querySelector(".hint").hidden = false;
equip();
document.addEventListener("toggle", equip, true);

// Dim what does not fit into the chosen memory, and mark the advice for it.
const budget = document.querySelector("form.budget");
if (budget) {
  const fit = () => {
    const option = budget.elements.budget.selectedOptions[0];
    const model = budget.elements.model.value;
    const limit = option.value ? Number(option.dataset[model]) : Infinity;
    for (const row of document.querySelectorAll(".dots-row")) row.classList.toggle("out", !(Number(row.dataset[model] ?? 0) <= limit));
    for (const item of document.querySelectorAll("li[data-budgets]")) item.classList.toggle("chosen", item.dataset.budgets.split(" ").includes(option.value));
  };
  budget.hidden = false;
  budget.addEventListener("input", fit);
  budget.addEventListener("submit", (event) => event.preventDefault());
}

// Show the answers that match the filters.
const form = document.querySelector("form.filters");
if (form) {
  const rows = [...document.querySelectorAll("#answers article")];
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const show = () => {
    const filters = Object.fromEntries(new FormData(form));
    const words = filters.text.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    const rest = document.querySelector("#answers .rest");
    if (rest && Object.values(filters).some(Boolean)) rest.open = true;
    for (const row of rows) {
      const fits =
        words.every((word) => texts.get(row).includes(word)) &&
        (!filters.category || row.dataset.category === filters.category) &&
        (!filters.winner || row.dataset.winner === filters.winner) &&
        (!filters.chosen || row.dataset.chosen.split(" ").includes(filters.chosen));
      row.hidden = !fits;
      count += fits;
    }
    form.querySelector("output").textContent = `${count} of ${rows.length} shown`;
  };
  form.hidden = false;
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}

// Open what is folded for printing, for browsers whose styles cannot.
const opened = [];
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details:not([open], .source, .copy)")) {
    fold.open = true;
    opened.push(fold);
  }
});
addEventListener("afterprint", () => opened.splice(0).forEach((fold) => (fold.open = false)));
