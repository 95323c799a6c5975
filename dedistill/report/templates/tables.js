const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Choices: radios of one data-kind stay in step and show the .when elements that match.
const chosen = {};
function choose(kind, value) {
  chosen[kind] = value;
  for (const radio of all(".choice input")) if (radio.dataset.kind === kind) radio.checked = radio.value === value;
  const differs = (item) => Object.keys(chosen).some((k) => k in item.dataset && item.dataset[k] !== chosen[k]);
  for (const item of all(".when")) item.hidden = differs(item);
}
for (const radio of all(".choice input")) {
  if (radio.checked) choose(radio.dataset.kind, radio.value);
  radio.addEventListener("change", () => choose(radio.dataset.kind, radio.value));
}

// Sortable tables: numbers first falling, text first rising; missing values always last.
for (const button of all("th button[data-sort]")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0], column = head.cellIndex;
    const numeric = button.dataset.sort === "number";
    const before = head.getAttribute("aria-sort");
    const sign = (before ? before === "descending" : !numeric) ? 1 : -1;
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.value;
    const compare = (a, b) => (numeric ? a - b : a.localeCompare(b));
    body.append(...[...body.rows].sort((a, b) =>
      key(a) === "" || key(b) === "" ? (key(a) === "") - (key(b) === "") : sign * compare(key(a), key(b))));
  });
}

// Tables can be copied as text, a tab between fields; a cell that spans several is followed by empty fields.
function fields(table) {
  const grid = [...table.rows].map(() => []);
  [...table.rows].forEach((row, r) => {
    let column = 0;
    for (const cell of row.cells) {
      while (grid[r][column] !== undefined) column++;
      for (let down = 0; down < cell.rowSpan && grid[r + down]; down++)
        for (let right = 0; right < cell.colSpan; right++)
          grid[r + down][column + right] = down || right ? "" : cell.innerText.replace(/\s+/g, " ").trim();
      column += cell.colSpan;
    }
  });
  return grid.map((row) => row.join("\t")).join("\n") + "\n";
}
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // some browsers have no clipboard for pages from the file system, or ask and are refused
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "unseen";
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
for (const table of all("table.numbers")) {
  const tools = document.createElement("div"), button = document.createElement("button");
  tools.className = "tools";
  button.className = "copy";
  button.type = "button";
  button.textContent = "Copy table";
  button.title = "Copy the table's text, for a spreadsheet";
  button.setAttribute("aria-live", "polite");
  button.addEventListener("click", async () => {
    const done = await copy(fields(table));
    button.focus();
    button.textContent = done ? "Copied" : "Not allowed here";
    setTimeout(() => { button.textContent = "Copy table"; }, 1500);
  });
  tools.append(button);
  (table.closest(".scroll") || table).before(tools);
}
