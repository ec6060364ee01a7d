"use strict";
// Optional: sorting, filtering, and the origin of a number on click. The page is complete without it.

// Sort a table by a column, descending first. Empty cells stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const sort = (index) => {
    const descending = heads[index].getAttribute("aria-sort") !== "descending";
    const sign = descending ? -1 : 1;
    const value = (row) => row.cells[index].dataset.sort ?? row.cells[index].textContent;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
    };
    heads.forEach((head, i) => head.setAttribute("aria-sort", i !== index ? "none" : descending ? "descending" : "ascending"));
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  };
  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(index));
    head.append(button);
    head.setAttribute("aria-sort", "none");
  });
}

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

// Show the origin of a number on click.
if ("popover" in HTMLElement.prototype) {
  const box = document.createElement("div");
  box.popover = "auto";
  box.className = "origin";
  document.body.append(box);
  document.addEventListener("click", (event) => {
    const number = event.target.closest("data[data-key]");
    if (!number || event.target.closest("button, summary, a")) return;
    const [file, key] = number.dataset.key.split("#");
    const row = document.querySelector(`tr[data-file="${CSS.escape(file)}"]`);
    const lines = [["Value", number.value], ["Key", key], ["File", file]];
    if (row) lines.push(["Stage", row.cells[1].textContent], ["md5", row.cells[2].textContent], ["Reproduce with", `dvc repro ${row.cells[1].textContent}`]);
    const list = document.createElement("dl");
    for (const [name, text] of lines) {
      const [term, value] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = name;
      value.textContent = text;
      list.append(term, value);
    }
    box.replaceChildren(list);
    box.showPopover();
  });
}

// Open folded texts for printing.
addEventListener("beforeprint", () => document.querySelectorAll("details.fold").forEach((fold) => (fold.open = true)));
