// The viewer: one image large; arrow keys walk through the gallery it belongs to; a pinned image A can take its place.
const viewer = document.querySelector(".viewer"), stage = viewer.querySelector(".stage");
const part = (name) => viewer.querySelector(name);
const step = (button) => button.dataset.move.split(" ").map(Number);
const BLINK = 700, GLANCE = 350; // milliseconds that an image stays; that a key is held for a glance
let current = null, pinned = null, flipped = false, blinking = 0, pressed = 0;

function neighbour(down, right) {
  const field = current.closest("td"), rows = field.closest("table").rows;
  let row = field.parentNode.rowIndex, column = field.cellIndex;
  for (;;) {
    row += down; column += right;
    if (column < 0 || !rows[row] || (right && !rows[row].cells[column])) return null;
    const shot = rows[row].cells[column] && rows[row].cells[column].querySelector("a.shot");
    if (shot) return shot;
  }
}
function counterpart() {
  const mine = current.closest(".gallery");
  const same = all(".gallery").filter((g) => g.dataset.group === mine.dataset.group);
  for (let i = 1; i < same.length; i++) {
    const shot = all("a.shot", same[(same.indexOf(mine) + i) % same.length]).find((s) => s.dataset.at === current.dataset.at);
    if (shot) return shot;
  }
  return null;
}

function fill(image, shot) {
  image.src = shot.href;
  image.alt = shot.querySelector("img").alt;
  image.classList.toggle("tiny", shot.closest("table").classList.contains("tiny"));
}
function resize() {
  const thumbnail = current.querySelector("img"), tiny = current.closest("table").classList.contains("tiny");
  const width = +thumbnail.getAttribute("width"), height = +thumbnail.getAttribute("height");
  const fit = Math.min(700, innerWidth - 60) / width, tall = innerHeight * .58 / height;
  const factor = Math.min(fit, tall, tiny ? 480 / Math.min(width, height) : 1), whole = tiny && factor > 1;
  stage.style.width = Math.round(width * (whole ? Math.floor(factor) : factor)) + "px";
  stage.style.aspectRatio = width + " / " + height;
}
// Says which image is seen, and makes the buttons fit.
function tell() {
  const comparing = pinned && pinned !== current, shot = flipped ? pinned : current, table = shot.closest("table");
  part(".a").hidden = !flipped;
  part(".b").hidden = flipped;
  part(".badge").hidden = !comparing;
  part(".badge").textContent = flipped ? "A" : "B";
  const set = (name, text) => { part("p." + name).textContent = text || ""; };
  const head = table.tHead && table.tHead.rows[0].cells[shot.closest("td").cellIndex];
  set("prompt", shot.dataset.prompt);
  set("where", (comparing ? (flipped ? "A: " : "B: ") : "") + shot.dataset.where);
  set("image", shot.dataset.numbers);
  set("cell", head && head.dataset.cell);
  for (const button of all("button[data-move]", viewer)) button.disabled = !neighbour(...step(button));
  part("[data-other]").hidden = !counterpart();
  part("[data-pin]").textContent = pinned === current ? "Let A go" : "Pin as A";
  part("[data-pin]").setAttribute("aria-pressed", pinned === current);
  for (const name of ["flip", "blink"]) part(`[data-${name}]`).disabled = !comparing;
  part("[data-flip]").setAttribute("aria-pressed", flipped);
  part("[data-blink]").setAttribute("aria-pressed", blinking > 0);
  if (document.activeElement.disabled) viewer.focus(); // a disabled button would swallow the keys
}
function flip(to = !flipped) {
  flipped = to && pinned !== null && pinned !== current;
  tell();
}
function rest() {
  clearInterval(blinking);
  blinking = 0;
  flipped = false;
}
function blink() {
  const start = !blinking && !matchMedia("(prefers-reduced-motion: reduce)").matches;
  rest();
  if (start) blinking = setInterval(flip, BLINK);
  flip(start);
}
function pin(shot) {
  rest();
  if (pinned) pinned.classList.remove("pinned");
  pinned = shot;
  if (shot) {
    shot.classList.add("pinned");
    fill(part(".a"), shot);
  }
  tell();
}
function show(shot) {
  if (!shot) return;
  rest();
  current = shot;
  // The next candidate's grid comes into view too, so that closing the viewer returns to the image last seen.
  const panel = shot.closest(".when");
  if (panel && panel.hidden) for (const kind in chosen) if (kind in panel.dataset) choose(kind, panel.dataset[kind]);
  fill(part(".b"), shot);
  resize();
  if (!viewer.open) { viewer.showModal(); viewer.focus(); }
  tell();
}

document.addEventListener("click", (event) => {
  const shot = event.target.closest("a.shot");
  if (!shot || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  show(shot);
});
const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
viewer.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat && !moves[event.key]) return;
  const key = event.key.toLowerCase();
  if (moves[event.key]) { event.preventDefault(); show(neighbour(...moves[event.key])); }
  else if (key === "c") show(counterpart());
  else if (key === "a") pin(pinned === current ? null : current);
  else if (key === "b") { pressed = event.timeStamp; flip(); }
  else if (key === "?") part(".help").open = !part(".help").open;
  else if (key === "escape" && pinned) { event.preventDefault(); pin(null); }
});
viewer.addEventListener("keyup", (event) => {
  if (event.key.toLowerCase() === "b" && event.timeStamp - pressed > GLANCE) flip();
});
viewer.addEventListener("click", (event) => {
  const button = event.target.closest("button"), does = button ? button.dataset : {};
  if (event.target === viewer || "close" in does) viewer.close();
  else if ("other" in does) show(counterpart());
  else if ("pin" in does) pin(pinned === current ? null : current);
  else if ("flip" in does) flip();
  else if ("blink" in does) blink();
  else if (button) show(neighbour(...step(button)));
});
viewer.addEventListener("close", () => { rest(); if (current) current.focus(); });
addEventListener("resize", () => { if (viewer.open) resize(); });
