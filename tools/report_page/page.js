"use strict";
// Sorts a table by the column whose heading is pressed; numbers by data-value, everything else as text.
function valueOf(row, column) {
  const cell = row.cells[column];
  const number = cell.dataset.value;
  return number === undefined ? cell.textContent.trim() : number === "" ? null : Number(number);
}

function sortBy(table, column, ascending) {
  const body = table.tBodies[0];
  const rows = [...body.rows].sort((first, second) => {
    const [a, b] = [valueOf(first, column), valueOf(second, column)];
    if (a === null || b === null) return (a === null) - (b === null); // what is missing stays at the end
    const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
    return ascending ? order : -order;
  });
  body.append(...rows);
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const isNumber = heading.classList.contains("number");
    // Numbers begin with the largest, text with the first.
    const ascending = heading.ariaSort ? heading.ariaSort === "descending" : !isNumber;
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    sortBy(heading.closest("table"), heading.cellIndex, ascending);
  });
}
