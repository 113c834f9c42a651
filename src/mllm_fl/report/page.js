"use strict";
// Sorting and copying only: without this script the page loses nothing else.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = (row, i) => {
    const cell = row.cells[i], exact = cell.dataset.value;
    return exact === undefined ? (/^–?$/.test(cell.textContent) ? null : cell.textContent) : Number(exact);
  };
  const order = (x, y) => typeof x === "number" && typeof y === "number" ? x - y
    : String(x).localeCompare(String(y), undefined, { numeric: true });
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending" || (!head.hasAttribute("aria-sort") && !body.rows[0]?.cells[i].dataset.value);
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const keyed = [...body.rows].map((row) => [value(row, i), row]);
      keyed.sort(([x], [y]) => x === null || y === null ? (x === null) - (y === null) : up ? order(x, y) : order(y, x));
      body.append(...keyed.map(([, row]) => row));
    });
  });
  const say = document.createElement("div");
  say.className = "copy";
  for (const [label, text] of [["Copy as CSV", csv], ["Copy as LaTeX", latex]]) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.setAttribute("aria-label", label + ": " + table.caption.textContent);
    button.addEventListener("click", async () => {
      button.textContent = await copy(text(table)) ? "Copied" : "Could not copy";
      setTimeout(() => { button.textContent = label; }, 2000);
    });
    say.append(button);
  }
  table.parentElement.after(say);
}

function csv(table) {
  const rows = [...table.rows], quote = (text) => '"' + String(text).replaceAll('"', '""') + '"';
  const spread = [...rows[0].cells].map((_, i) => rows.some((row) => row.cells[i].dataset.sd !== undefined));
  return rows.map((row, r) => [...row.cells].flatMap((cell, i) => {
    const text = quote(cell.dataset.value ?? cell.textContent.trim());
    const sd = r ? cell.dataset.sd ?? "" : quote(cell.textContent.trim() + " (sd)");
    return spread[i] ? [text, sd] : [text];
  }).join(",")).join("\n") + "\n";
}

function latex(table) {
  const signs = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$", "–": "--", "−": "$-$" };
  const plain = (text) => text.trim().replace(/[\\~^±–−]/g, (c) => signs[c] ?? c).replace(/(?<!\\textbackslash)[&%#_]/g, "\\$&");
  const lines = [...table.rows].map((row) => [...row.cells].map((cell) => plain(cell.textContent)).join(" & ") + " \\\\");
  return ["\\begin{tabular}{l" + "r".repeat(table.rows[0].cells.length - 1) + "}", "\\toprule", lines[0], "\\midrule", ...lines.slice(1),
    "\\bottomrule", "\\end{tabular}", ""].join("\n");
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement("textarea"), back = document.activeElement;
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    back?.focus();
    return done;
  }
}
