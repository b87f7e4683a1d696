"use strict";
// A heading that is pressed sorts its table: upwards, downwards, as it was. Without this script the page is whole.
const NEXT = { none: "ascending", ascending: "descending", descending: "none" };
const NUMBER = /(?:^|[^\w.])([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)/i;
const words = new Intl.Collator("en", { numeric: true });

function number(text) {
  if (text.startsWith("beyond the recording")) return Infinity;
  const near = /^1 ([-+]) (\d\S*)$/.exec(text); // as in 1 - 1.0e-05
  if (near) return 1 + Number(near[1] + near[2]);
  const found = NUMBER.exec(text);
  return found ? Number(found[1]) : NaN;
}

function compare(one, other, numeric, sign) {
  if (!numeric) return sign * words.compare(one, other);
  const [a, b] = [number(one), number(other)];
  if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b); // what is no number stands last, either way
  return a === b ? 0 : sign * (a < b ? -1 : 1);
}

function sorted(rows, column, numeric, way) {
  if (way === "none") return rows;
  const text = (row) => row.cells[column].textContent.trim();
  return [...rows].sort((one, other) => compare(text(one), text(other), numeric, way === "ascending" ? 1 : -1));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const way = NEXT[head.getAttribute("aria-sort")];
      for (const each of heads) each.setAttribute("aria-sort", each === head ? way : "none");
      body.append(...sorted(rows, column, head.classList.contains("n"), way));
    });
  });
}

const contents = document.querySelector(".contents");
contents.addEventListener("click", (event) => { if (event.target.closest("a")) contents.open = false; });

let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const each of closed) each.open = true;
});
addEventListener("afterprint", () => { for (const each of closed) each.open = false; });
