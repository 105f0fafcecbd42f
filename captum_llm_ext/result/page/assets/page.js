/* Pinned and hovered selection; events of pointer and keyboard. */

let pinned = null;    /* {kind: "rows", from, to} | {kind: "column", index} | null */
let pointed = null;   /* a piece | null */
let anchor = null;    /* the piece of the answer from which Shift extends */
let commonScale = false;
const views = new Map();

function viewOf(spec) {
  const key = spec.kind === "rows" ? "rows " + spec.from + " " + spec.to : "column " + spec.index;
  if (!views.has(key)) {
    if (views.size > 64) views.clear();
    views.set(key, spec.kind === "rows" ? rowsView(spec.from, spec.to) : columnView(spec.index));
  }
  const view = views.get(key);
  view.links ||= {};
  return view;
}

const specOf = (piece) => (piece.side === "answer"
  ? { kind: "rows", from: piece.from, to: piece.to } : { kind: "column", index: piece.feature });
const wanted = () => pinned || (pointed ? specOf(pointed) : { kind: "rows", from: 0, to: nTarget });

/* Elements that change on hover never shrink: the text would move under the pointer. */
const tallest = new Map([[at("panel"), 0], [at("details"), 0]]);
function keepHeights() {
  for (const [el, before] of tallest) {
    const height = el.offsetHeight;
    if (height <= before) continue;
    tallest.set(el, height);
    el.style.minHeight = height + "px";
  }
}
function forgetHeights() {
  for (const el of tallest.keys()) { tallest.set(el, 0); el.style.minHeight = ""; }
}

let painted = null;
function render() {
  const view = viewOf(wanted());
  root.classList.toggle("shares", isThrough());
  const state = [commonScale, root.className, pinned !== null, block].join();
  if (painted === null || painted.view !== view || painted.state !== state) {
    paint(view, commonScale);
    drawPanel(view, pinned !== null);
    view.links[block] ||= hasLinks(view) ? linksOf(view) : [];
    drawLinks(view.links[block]);
    drawMap();
    painted = { view, state };
  }
  at("details").textContent = describe(view, pinned && pointed);
  keepHeights();
}

/* Hover, click, keyboard ------------------------------------------------------------------------- */

const pieceAt = (side, target) => {
  const el = target.closest && target.closest(".piece");
  return el && at(side).contains(el) ? pieces[side][Number(el.dataset.i)] : null;
};
const pinRows = (a, b) => { pinned = { kind: "rows", from: Math.min(a.from, b.from), to: Math.max(a.to, b.to) }; };

function toggle(piece) {
  const spec = specOf(piece);
  const same = pinned && pinned.kind === spec.kind && pinned.index === spec.index
    && pinned.from === spec.from && pinned.to === spec.to;
  pinned = same ? null : spec;
  if (piece.side === "answer") anchor = piece;
}

function focusPiece(piece, byKey = false) {
  for (const other of pieces[piece.side]) if (other.el.tabIndex === 0) other.el.tabIndex = -1;
  piece.el.tabIndex = 0;
  piece.el.focus({ preventScroll: true, focusVisible: byKey });
}

/* The nearest piece of the next line above or below. */
function lineStep(all, i, way) {
  const place = (k) => all[k].ink.getBoundingClientRect();
  const here = place(i), apart = (rect) => Math.abs(rect.top - here.top) > here.height / 2;
  let k = i + way;
  while (all[k] && !apart(place(k))) k += way;
  if (!all[k]) return i;
  const line = place(k).top, away = (j) => Math.abs(place(j).left - here.left);
  let best = k;
  for (; all[k] && Math.abs(place(k).top - line) < here.height / 2; k += way) if (away(k) < away(best)) best = k;
  return best;
}

function keyTarget(key, all, i) {
  const ahead = getComputedStyle(all[i].el.parentElement).direction === "rtl" ? "ArrowLeft" : "ArrowRight";
  switch (key) {
    case "ArrowRight": case "ArrowLeft": return Math.max(0, Math.min(i + (key === ahead ? 1 : -1), all.length - 1));
    case "ArrowDown": return lineStep(all, i, 1);
    case "ArrowUp": return lineStep(all, i, -1);
    case "Home": return 0;
    case "End": return all.length - 1;
    default: return -1;
  }
}

function onKey(side, event) {
  const piece = pieceAt(side, event.target);
  if (!piece) return;
  const next = keyTarget(event.key, pieces[side], piece.i);
  if (next >= 0) {
    const to = pieces[side][next];
    if (side === "answer" && event.shiftKey) {
      if (!pinned || pinned.kind !== "rows" || !anchor) anchor = piece;
      pinRows(anchor, to);
    }
    focusPiece(to, true);
    to.el.scrollIntoView({ block: "nearest" });
  } else if (event.key === "Enter" || event.key === " ") toggle(piece);
  else return;
  event.preventDefault();
  render();
}

for (const side of ["prompt", "answer"]) {
  const box = at(side);
  const point = (piece) => { pointed = piece; render(); };
  /* Gaps between pieces do not count as leaving: the view would flicker. */
  box.addEventListener("pointerover", (event) => {
    const piece = pieceAt(side, event.target);
    if (piece && !dragging) point(piece);
  });
  box.addEventListener("pointerleave", () => point(null));
  box.addEventListener("focusin", (event) => point(pieceAt(side, event.target)));
  box.addEventListener("focusout", () => point(null));
  box.addEventListener("keydown", (event) => onKey(side, event));
}

at("prompt").addEventListener("click", (event) => {
  const piece = pieceAt("prompt", event.target);
  if (!piece || !getSelection().isCollapsed) return; /* the user selects text */
  toggle(piece);
  focusPiece(piece);
  render();
});

let dragging = null; /* {from, moved} while the button is down on the answer */
at("answer").addEventListener("pointerdown", (event) => {
  const piece = pieceAt("answer", event.target);
  if (!piece || event.button !== 0) return;
  if (event.pointerType === "mouse") event.preventDefault(); /* no selection of text by dragging */
  const extends_ = event.shiftKey && pinned !== null && anchor !== null;
  dragging = { from: extends_ ? anchor : piece, moved: extends_, piece };
  if (dragging.moved) pinRows(dragging.from, piece);
  render();
});
at("answer").addEventListener("pointerover", (event) => {
  const piece = pieceAt("answer", event.target);
  if (!dragging || !piece || (!dragging.moved && piece === dragging.from)) return;
  dragging.moved = true;
  anchor = dragging.from;
  pinRows(dragging.from, piece);
  render();
});
addEventListener("pointerup", () => {
  if (!dragging) return;
  const { moved, piece } = dragging;
  dragging = null;
  if (!moved) toggle(piece);
  focusPiece(piece);
  render();
});
addEventListener("pointercancel", () => { dragging = null; });

/* The pinned selection survives a change of level: as the part that contains it, or its first part. */
function setLevel(side, number) {
  drawLinks([]); /* their pieces will be removed */
  if (side === "prompt") {
    const first = pinned && pinned.kind === "column" ? prompt.partOf.indexOf(pinned.index) : -1;
    prompt = promptLevel(number);
    if (first >= 0) pinned = { kind: "column", index: prompt.partOf[first] };
  } else {
    answer = answerLevelAt(number);
    if (pinned && pinned.kind === "rows") {
      const runs = answer.runs.filter(([from, to]) => from < pinned.to && to > pinned.from);
      pinned = { kind: "rows", from: runs[0][0], to: runs[runs.length - 1][1] };
    }
    anchor = null;
  }
  views.clear();
  layOutSide(side);
  pointed = null;
  at(side + "-levels").querySelectorAll("input").forEach((input) => { input.checked = Number(input.value) === number; });
  updateHint();
  remeasure();
}
/* One step finer or coarser, if there is one. */
function stepLevel(side, way) {
  const levels = side === "prompt" ? promptLevels : answerLevels, number = levels.indexOf(side === "prompt" ? prompt : answer) + way;
  if (number < 0 || number >= levels.length) return;
  setLevel(side, number);
  render();
}

/* Switches the value; the pinned selection is kept. */
function setValue(number) {
  drawLinks([]);
  useReading(number);
  offerEffects();
  views.clear();
  at("about").textContent = about();
}

/* Switches between direct effects and total shares. */
function setEffect(name) {
  drawLinks([]);
  effect = name;
  views.clear();
  for (const id of ["colours", "scales"]) at(id).hidden = isThrough() || (id === "colours" && isUnsigned);
  at("effect").querySelector("[value=" + name + "]").checked = true;
  updateHint();
  forgetHeights();
}

/* From coarse to fine, the order of use. */
function offerLevels(side, levels) {
  offer(at(side + "-levels"), side + "-level", levels.map(({ name }, i) => [name, i]).reverse(), FIRST[side]);
}

function offer(box, group, choices, first) {
  for (const [name, i] of choices) {
    const label = make("label"), input = make("input");
    Object.assign(input, { type: "radio", name: group, value: i, checked: i === first });
    label.append(input, make("span", "", name));
    box.append(label);
  }
  box.hidden = choices.length < 2;
}

function updateHint() {
  const part = answer.name, cause = prompt.name, isFinest = prompt === promptLevels[0];
  at("hint").textContent = "Click a " + part + " of the answer to see what it was written because of, or a " + cause + " of the prompt to see where it mattered; drag for several."
    + (isThrough() ? " Colours are shares in the end, through the answer’s own words; “direct” has what led to each token by itself." : "")
    + (isFinest ? "" : " The key + looks closer at the prompt, − less close.");
}

function clear() { pinned = null; pointed = null; render(); }
at("clear").addEventListener("click", clear);
at("sentence").addEventListener("click", () => {
  const [from, to] = sentenceOf(viewOf(wanted()));
  pinned = { kind: "rows", from, to };
  render();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape") clear();
  if (event.ctrlKey || event.metaKey || event.altKey || (event.target.matches && event.target.matches("input"))) return;
  const side = at("answer").contains(event.target) ? "answer" : "prompt";
  if (event.key === "+" || event.key === "=") stepLevel(side, -1);
  if (event.key === "-" || event.key === "−") stepLevel(side, 1);
});

at("tools").addEventListener("change", (event) => {
  const { name, value } = event.target;
  if (name === "prompt-level" || name === "answer-level") setLevel(name.split("-")[0], Number(value));
  else if (name === "colour") root.classList.replace(...(value === "absolute" ? ["signed", "absolute"] : ["absolute", "signed"]));
  else if (name === "value") setValue(Number(value));
  else if (name === "scale") commonScale = value === "common";
  else if (name === "block") block = value;
  else if (name === "effect") setEffect(value);
  else if (name === "way") showMode(value);
  else redrawLinks();
  render();
});

/* Initialisation --------------------------------------------------------------------------------- */

const VALUES = { log_prob: "log-probability", prob: "probability", logit: "logit", contrast: "contrast" };
const nameOfValue = (attrTarget) => VALUES[attrTarget] || attrTarget;

function showMode(way) {
  at("map").hidden = way !== "map";
  at("running").hidden = way === "map";
  painted = null;
  if (way !== "map") remeasure();
}

function about() {
  if (data.about) return data.about.join(" · ");
  const value = nameOfValue(data.attr_target) + (data.attr_target === "contrast" ? " (why each token rather than its foils)" : "");
  const evaluations = data.n_evaluations === null || data.n_evaluations === undefined ? ""
    : (data.estimate ? "an estimate from " : "") + data.n_evaluations.toLocaleString("en") + " evaluations" + (nUnknownErrors && !hasErrors ? ", of unknown error" : "");
  return [data.method, evaluations, value + (unit && unit !== "logits" ? " in " + unit : "")].filter(Boolean).join(" · ");
}

function provenance() {
  for (const [name, text] of data.noted || []) at("provenance").append(make("dt", "", name), make("dd", "", text));
}

root.classList.add(isUnsigned ? "absolute" : "signed");
at("colours").hidden = isUnsigned;
/* Totals may exist for one of the values only. */
function offerEffects() {
  at("effect").hidden = !data.total;
  if (!data.total && isThrough()) {
    setEffect("direct");
  }
}
offerEffects();
at("about").textContent = about();
provenance();
offerLevels("prompt", promptLevels);
offerLevels("answer", answerLevels);
offer(at("values"), "value", readings.map((reading, i) => [nameOfValue(reading.attr_target), i]), 0);
at("blocks").hidden = !nOutput || nTarget < 2;
at("narrative").textContent = (data.narrative || []).join(" ");
setEffect("direct");
render();
/* A long prompt is scrolled to its strongest part. */
function showStrongest() {
  const box = at("prompt"), [first] = causesIn(viewOf({ kind: "rows", from: 0, to: nTarget }), "prompt");
  const [piece] = first ? first.piecesOf(first.i) : [];
  if (!piece || box.scrollHeight <= box.clientHeight + 4) return;
  const way = piece.el.getBoundingClientRect().top - box.getBoundingClientRect().top;
  if (way > box.clientHeight * 0.7) box.scrollTop = way - box.clientHeight * 0.3;
}
showStrongest();
addEventListener("beforeprint", () => { at("computed").open = true; });
/* In a notebook, the iframe is resized to the page's height. */
let frame = null;
try { frame = window.frameElement; } catch { /* a frame of another origin keeps its height */ }
if (window.parent !== window) root.classList.add("framed");
function remeasure() {
  for (const { measure, draw } of rulers) { measure(); draw(); }
  redrawLinks();
}
let width = 0;
new ResizeObserver(() => {
  if (width !== (width = document.body.clientWidth)) { forgetHeights(); keepHeights(); }
  remeasure();
  if (frame) frame.style.height = Math.ceil(document.body.getBoundingClientRect().height) + "px";
}).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", remeasure);
