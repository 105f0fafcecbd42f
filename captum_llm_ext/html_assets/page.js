(() => {
"use strict";

const data = JSON.parse(document.getElementById("attribution-data").textContent);
const root = document.documentElement;
const at = (id) => document.getElementById(id);

/* Numbers: what was computed, summed over the tokens of a view ------------------------------- */

const nTarget = data.output_tokens.length;
const nOutput = data.output_features ? data.output_features.length : 0;
const unit = { log_prob: "nats", logit: "logits", prob: "" }[data.attr_target] ?? "";

/* A feature of the answer can be a cause only of what follows its last token. */
const lastToken = new Array(nOutput).fill(-1);
data.output.forEach((piece, t) => { if (piece.feature !== null) lastToken[piece.feature] = t; });

const known = (x) => (x === null || x === undefined ? NaN : x);
const total = (xs, from, to) => {
  let sum = 0;
  for (let t = from; t < to; t++) sum += known(xs ? xs[t] : null);
  return sum;
};

/* Sums of rows from…to; errors add as if independent, since their covariances are not stored. */
function sumRows(values, errors, from, to, width) {
  const value = new Float64Array(width), error = new Float64Array(width).fill(errors ? 0 : NaN);
  for (let t = from; t < to; t++) {
    const row = values[t], spread = errors && errors[t];
    for (let j = 0; j < width; j++) {
      value[j] += known(row[j]);
      if (errors) error[j] += known(spread && spread[j]) ** 2;
    }
  }
  return { value, error: error.map(Math.sqrt) };
}

function rowsView(from, to) {
  const prompt = sumRows(shown.attr, shown.se, from, to, shown.names.length);
  const output = nOutput
    ? sumRows(data.output_attr, data.output_attr_se, from, to, nOutput)
    : { value: new Float64Array(0), error: new Float64Array(0) };
  return { kind: "rows", from, to, prompt, output };
}

function columnView(index) {
  const value = Float64Array.from(shown.attr, (row) => known(row[index]));
  const error = Float64Array.from(shown.attr, (_, t) => {
    const spread = shown.se && shown.se[t];
    return known(spread && spread[index]);
  });
  return { kind: "column", index, tokens: { value, error } };
}

const within = (series, i) => Math.abs(series.value[i]) < 1.96 * series.error[i];
const peak = (values, start = 0) => {
  let most = start;
  for (const x of values) if (Math.abs(x) > most) most = Math.abs(x);
  return most;
};

/* Levels: the prompt by its features, or by the larger parts that these make up. */
const parts = (rows, partOf, width, from, to) => rows && rows.map((row) => {
  const sums = new Float64Array(width);
  if (row) row.forEach((x, j) => { sums[partOf[j]] += from(known(x)); });
  else sums.fill(NaN);
  return sums.map(to);
});
function levelOf({ name, parts: names, part_of: partOf }) {
  const attr = parts(data.token_attr, partOf, names.length, (x) => x, (x) => x);
  return { name, names, partOf, attr, se: parts(data.token_attr_se, partOf, names.length, (x) => x * x, Math.sqrt) };
}
const finest = { name: "finest", names: data.input_tokens, partOf: data.input_tokens.map((_, j) => j), attr: data.token_attr, se: data.token_attr_se };
const levels = [() => finest, ...(data.levels || []).map((level) => () => levelOf(level)).reverse()];
let shown = finest;
function peakOfCells() {
  let most = 0;
  for (const row of shown.attr) most = peak(row, most);
  for (const row of data.output_attr || []) most = peak(row, most);
  return most;
}
let cellPeak = peakOfCells();

function ownPeak(view) {
  if (view.kind === "column") return peak(view.tokens.value);
  return peak(view.output.value, peak(view.prompt.value));
}

/* Words for numbers and for text -------------------------------------------------------------- */

const decimals = (most) => (most > 0 ? Math.min(6, Math.max(most < 1000 ? 1 : 0, 2 - Math.floor(Math.log10(most)))) : 2);
function plain(x, most) {
  if (!Number.isFinite(x)) return "?";
  const text = Math.abs(x).toFixed(decimals(most));
  return (x < 0 && Number(text) !== 0 ? "−" : "") + text;
}
function signed(x, most) {
  const text = plain(x, most);
  return x > 0 && Number(text) !== 0 ? "+" + text : text;
}
function plusMinus(error, most) {
  if (!Number.isFinite(error)) return "";
  const text = plain(error, most);
  return error > 0 && Number(text) === 0 ? " ± <" + (10 ** -decimals(most)).toFixed(decimals(most)) : " ± " + text;
}
const withUnit = (text) => (unit ? text + " " + unit : text);
function percent(logProb) {
  const share = 100 * Math.exp(logProb);
  if (!(share <= 101)) return "";
  return share < 0.01 ? "<0.01\u00a0%" : Number(share.toPrecision(2)) + "\u00a0%";
}

function visible(text) {
  const inner = text.trim();
  if (inner) return inner.replace(/\s+/g, " ");
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣") || "∅";
}
const short = (text, most = 48) => (text.length > most ? text.slice(0, most - 1).trimEnd() + "…" : text);
const quoted = (text, most) => "“" + short(visible(text), most) + "”";
const tokensText = (from, to) => {
  if (from === 0 && to === nTarget && nTarget > 1) return "Whole answer";
  return quoted(data.output.slice(from, to).map((piece) => piece.text).join(""));
};

function make(tag, className, text) {
  const el = document.createElement(tag);
  if (className) el.className = className;
  if (text !== undefined) el.textContent = text;
  return el;
}

/* Running text -------------------------------------------------------------------------------- */

/* White space around a piece stays uncoloured; a piece of nothing else is coloured and marked. */
function fill(el, text) {
  const lead = text.match(/^\s*/)[0];
  const ink = make("span", "ink");
  if (lead.length === text.length) {
    text.split("\n").forEach((part, i) => {
      if (i) ink.append(make("span", "newline"), "\n");
      ink.append(part);
    });
    el.append(ink);
  } else {
    const body = text.slice(lead.length).trimEnd();
    ink.append(body);
    el.append(lead, ink, text.slice(lead.length + body.length));
  }
  return ink;
}

function layOut(box, side, pieces) {
  const made = [];
  for (const { text, feature, token } of pieces) {
    const live = side === "answer" || feature !== null;
    const el = make("span", live ? "piece" : "fixed");
    el.setAttribute("role", "option");
    const ink = fill(el, text);
    box.append(el);
    if (!live) { el.setAttribute("aria-disabled", "true"); continue; }
    if (!text.trim()) el.setAttribute("aria-label", /\n/.test(text) ? "new line" : text ? "space" : "empty");
    el.dataset.i = made.length;
    el.tabIndex = -1;
    made.push({ el, ink, side, feature, token, text, drawn: "", level: 0, chosen: null });
  }
  if (made.length) made[0].el.tabIndex = 0;
  return made;
}

/* Neighbouring tokens of one prompt feature are one piece; tokens of the answer stay apart. */
function joined(pieces) {
  const out = [];
  for (const { text, feature } of pieces) {
    const last = out[out.length - 1];
    if (last && last.feature === feature) last.text += text;
    else out.push({ text, feature });
  }
  return out;
}

if (data.prompt_layout === "list") at("prompt").classList.add("list");
const layOutPrompt = () => layOut(at("prompt"), "prompt", joined(data.prompt.map(
  ({ text, feature }) => ({ text, feature: feature === null ? null : shown.partOf[feature] }))));
let promptPieces = layOutPrompt();
const answerPieces = layOut(at("answer"), "answer", data.output.map((p, token) => ({ ...p, token })));
const pieces = { prompt: promptPieces, answer: answerPieces };

/* Where the strong parts of a long text are: marks beside its scroll bar. */
function ruler(box, marksOf) {
  const canvas = box.nextElementSibling;
  let marks = [], places = [], colours = [];
  const measure = () => {
    /* Asking for styles while painting would compute them twice. */
    const style = getComputedStyle(root);
    colours = ["--up", "--down", "--size"].map((name) => "rgb(" + style.getPropertyValue(name) + ")");
    const long = box.scrollHeight > box.clientHeight + 4 && box.clientHeight > 0;
    canvas.hidden = !long;
    canvas.width = 12;
    canvas.height = box.clientHeight;
    marks = marksOf();
    places = long ? marks.map((piece) => piece.el.offsetTop / box.scrollHeight) : [];
  };
  const draw = () => {
    if (canvas.hidden) return;
    const pen = canvas.getContext("2d"), absolute = root.classList.contains("absolute");
    pen.clearRect(0, 0, canvas.width, canvas.height);
    marks.forEach((piece, i) => {
      if (Math.abs(piece.level) < 0.08) return;
      pen.globalAlpha = Math.abs(piece.level);
      pen.fillStyle = colours[absolute ? 2 : piece.level > 0 ? 0 : 1];
      pen.fillRect(1, Math.round(places[i] * canvas.height), 10, 3);
    });
  };
  canvas.addEventListener("click", (event) => {
    box.scrollTop = (event.offsetY / canvas.clientHeight) * box.scrollHeight - box.clientHeight / 2;
  });
  return { measure, draw };
}
const rulers = [ruler(at("prompt"), () => promptPieces), ruler(at("answer"), () => answerPieces)];
const remeasure = () => { for (const { measure, draw } of rulers) { measure(); draw(); } };

/* State: what is kept, what is pointed at ------------------------------------------------------ */

let pinned = null;    /* {kind: "rows", from, to} | {kind: "column", index} | null */
let pointed = null;   /* a piece | null */
let anchor = 0;       /* the token from which Shift extends */
let commonScale = false;
const views = new Map();

function viewOf(spec) {
  const key = spec.kind === "rows" ? "rows " + spec.from + " " + spec.to : "column " + spec.index;
  if (!views.has(key)) {
    if (views.size > 64) views.clear();
    views.set(key, spec.kind === "rows" ? rowsView(spec.from, spec.to) : columnView(spec.index));
  }
  return views.get(key);
}

function wanted() {
  if (pinned) return pinned;
  if (!pointed) return { kind: "rows", from: 0, to: nTarget };
  if (pointed.side === "answer") return { kind: "rows", from: pointed.token, to: pointed.token + 1 };
  return { kind: "column", index: pointed.feature };
}

/* Painting ------------------------------------------------------------------------------------ */

/* The series and the place in it that colour a piece, or null where it has no number. */
function cellOf(view, piece) {
  if (view.kind === "column") return piece.side === "answer" ? [view.tokens, piece.token] : null;
  if (piece.side === "prompt") return [view.prompt, piece.feature];
  if (!nOutput || piece.feature === null || isLater(view, piece)) return null;
  return [view.output, piece.feature];
}
const isLater = (view, piece) => {
  const last = nOutput && piece.feature !== null ? lastToken[piece.feature] : piece.token;
  return last >= view.to - 1;
};
function isChosen(view, piece) {
  if (view.kind === "column") return piece.side === "prompt" && piece.feature === view.index;
  const whole = view.from === 0 && view.to === nTarget && nTarget > 1;
  return piece.side === "answer" && !whole && piece.token >= view.from && piece.token < view.to;
}

function paintPiece(view, piece, most) {
  const cell = cellOf(view, piece), chosen = isChosen(view, piece);
  let level = 0, sure = false;
  if (cell) {
    const [series, i] = cell, unsure = within(series, i);
    level = most > 0 ? Math.max(-1, Math.min(1, series.value[i] / most)) || 0 : 0;
    if (unsure) level *= 0.3;
    sure = !unsure && Math.abs(level) >= 0.1;
  }
  level = Math.round(level * 40) / 40;
  const later = view.kind === "rows" && piece.side === "answer" && !chosen && piece.token >= view.to;
  const drawn = "ink" + (level > 0 ? " up" : level < 0 ? " down" : "") + (sure ? " sure" : "")
    + (chosen ? " chosen" : "") + (later ? " later" : "");
  /* Most pieces change little from view to view, and restyling thousands of elements is slow. */
  if (piece.drawn !== drawn) piece.ink.className = piece.drawn = drawn;
  if (piece.chosen !== chosen) piece.el.setAttribute("aria-selected", (piece.chosen = chosen));
  if (piece.level !== level && level) piece.ink.style.setProperty("--a", Math.abs(level));
  piece.level = level;
}

function paint(view) {
  const most = commonScale ? Math.max(cellPeak, ownPeak(view)) : ownPeak(view);
  for (const piece of promptPieces) paintPiece(view, piece, most);
  for (const piece of answerPieces) paintPiece(view, piece, most);
  for (const { draw } of rulers) draw();
  const absolute = root.classList.contains("absolute");
  at("low").textContent = absolute ? "0" : plain(-most, most);
  at("high").textContent = withUnit(absolute ? plain(most, most) : signed(most, most));
}

/* Panel --------------------------------------------------------------------------------------- */

/* One line of the bridge from v(empty) to v(full); `span` is [low, high] of the whole bridge. */
function step(label, from, to, span, kind, aside) {
  const line = make("div", "step" + (kind === "point" ? " end" : ""));
  const name = make("span", "", label), track = make("div", "track"), mark = make("i");
  if (aside) name.append(make("small", "", aside));
  const width = span[1] - span[0] || 1, place = (x) => (100 * (x - span[0])) / width;
  mark.style.left = place(Math.min(from, to)) + "%";
  if (kind === "point") mark.className = "point";
  else {
    mark.className = to >= from ? "up" : "down";
    mark.style.width = Math.abs(place(to) - place(from)) + "%";
    const lead = make("u");
    lead.style.left = place(from) + "%";
    track.append(lead);
  }
  if (kind === "point" || Math.abs(to - from) > width / 400) track.append(mark);
  const most = Math.min(Math.max(Math.abs(span[0]), Math.abs(span[1])), width);
  line.append(name, track, make("b", "", kind === "point" ? plain(to, most) : signed(to - from, most)));
  return line;
}

function bridge(view) {
  const empty = total(data.empty_values, view.from, view.to);
  const full = total(data.full_values, view.from, view.to);
  const byPrompt = empty + view.prompt.value.reduce((a, b) => a + b, 0);
  const byOutput = byPrompt + view.output.value.reduce((a, b) => a + b, 0);
  const points = [empty, byPrompt, byOutput, full].filter(Number.isFinite);
  if (points.length < 4) return [];
  const span = [Math.min(...points), Math.max(...points)];
  const share = (x) => (data.attr_target === "log_prob" ? percent(x) : "");
  const steps = [
    step("v(empty)", empty, empty, span, "point", share(empty)),
    step("prompt", empty, byPrompt, span),
    nOutput ? step("earlier answer", byPrompt, byOutput, span) : "",
    step("gap", byOutput, full, span),
    step("v(full)", full, full, span, "point", share(full)),
  ];
  return [make("h2", "", "From all absent to all present" + (unit ? ", " + unit : "")), ...steps];
}

function strongest(view, count) {
  const rows = [];
  const gather = (series, piecesOf, where, textOf) => series.value.forEach((value, i) => {
    if (Math.abs(value) > 0) rows.push({ series, i, value, where, piecesOf, textOf });
  });
  if (view.kind === "column") {
    gather(view.tokens, (t) => [answerPieces[t]], "answer", (t) => data.output[t].text);
  } else {
    const owners = (all) => (j) => all.filter((piece) => piece.feature === j);
    gather(view.prompt, owners(promptPieces), "prompt", (j) => shown.names[j]);
    gather(view.output, owners(answerPieces), "answer", (j) => data.output_features[j]);
  }
  return rows.sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, count);
}

function tableRow(row, most) {
  const { series, i, value, where } = row, line = make("tr", within(series, i) ? "unsure" : "");
  const what = make("td", "what"), button = make("button", "", visible(row.textOf(i)));
  const barCell = make("td", "bar"), bar = make("i", value > 0 ? "up" : "down");
  const number = make("td", "value", signed(value, most));
  button.type = "button";
  button.title = row.textOf(i);
  bar.style.left = value > 0 ? "50%" : 50 - (46 * -value) / most + "%";
  bar.style.width = (46 * Math.abs(value)) / most + "%";
  number.append(make("small", "", plusMinus(series.error[i], most)));
  what.append(button);
  barCell.append(bar);
  line.append(what, make("td", "where", where), barCell, number);
  const owners = row.piecesOf(i);
  const find = (on) => () => owners.forEach((piece) => piece.ink.classList.toggle("found", on));
  line.addEventListener("pointerenter", find(true));
  line.addEventListener("pointerleave", find(false));
  button.addEventListener("focus", find(true));
  button.addEventListener("blur", find(false));
  button.addEventListener("click", () => owners[0] && owners[0].el.scrollIntoView({ block: "center" }));
  return line;
}

function drawPanel(view) {
  const rows = view.kind === "rows", count = rows ? view.to - view.from : 0;
  at("chosen-name").textContent = rows ? tokensText(view.from, view.to) : quoted(shown.names[view.index]);
  at("chosen-place").textContent = !rows ? "part " + (view.index + 1) + " of " + shown.names.length + " of the prompt"
    : count === nTarget ? nTarget + (nTarget === 1 ? " token" : " tokens, summed")
    : count === 1 ? "token " + (view.from + 1) + " of " + nTarget
    : "tokens " + (view.from + 1) + "–" + view.to + " of " + nTarget + ", summed";
  at("clear").hidden = !pinned;
  const most = ownPeak(view);
  if (rows) at("bridge").replaceChildren(...bridge(view));
  else {
    const sum = view.tokens.value.reduce((a, b) => a + b, 0);
    at("bridge").replaceChildren(make("p", "", withUnit(signed(sum, Math.max(most, Math.abs(sum)))) + " over the whole answer"));
  }
  at("top").caption.textContent = rows ? "Strongest causes" : "Where it mattered most";
  at("top").tBodies[0].replaceChildren(...strongest(view, 10).map((row) => tableRow(row, most)));
  const notes = [];
  if (rows && !nOutput) notes.push("The answer before each token was held fixed: only the prompt is a cause.");
  const summed = [rows && count > 1 ? "tokens" : "", shown === finest ? "" : "parts"].filter(Boolean);
  if (summed.length && data.token_attr_se) notes.push("Errors of a sum take its " + summed.join(" and ") + " as independent.");
  if (rows && count > 1 && data.attr_target === "prob") notes.push("A sum of the tokens' probabilities, not the probability of all of them.");
  if (data.token_attr_se) notes.push("± is one standard error; what lies within 1.96 of them is pale.");
  if (root.classList.contains("signed")) notes.push("Solid underline raises, dashed lowers.");
  at("note").textContent = notes.join(" ");
}

/* Details line -------------------------------------------------------------------------------- */

function describeCell(series, i) {
  const most = peak(series.value);
  return withUnit(signed(series.value[i], most) + plusMinus(series.error[i], most))
    + (within(series, i) ? ", within its error" : "");
}

function describeToken(view) {
  const full = total(data.full_values, view.from, view.to), empty = total(data.empty_values, view.from, view.to);
  const most = Math.max(Math.abs(full), Math.abs(empty)), name = tokensText(view.from, view.to);
  if (!Number.isFinite(most)) return name;
  return name + ": " + withUnit(plain(full, most)) + "; " + withUnit(plain(empty, most)) + " with everything absent";
}

function describeColumn(view) {
  const name = quoted(shown.names[view.index]), [first] = strongest(view, 1);
  if (!first) return name + " changed no token of the answer";
  return name + " mattered most for " + quoted(data.output[first.i].text) + ": " + describeCell(view.tokens, first.i);
}

function describe(view) {
  const piece = pointed, whole = view.kind === "rows" ? describeToken(view) : describeColumn(view);
  if (!pinned || !piece || isChosen(view, piece)) return whole;
  const target = view.kind === "rows" ? tokensText(view.from, view.to) : quoted(piece.text);
  const cell = cellOf(view, piece);
  if (cell) {
    const cause = view.kind === "column" ? shown.names[view.index]
      : piece.side === "prompt" ? shown.names[piece.feature] : data.output_features[piece.feature];
    return quoted(cause) + " → " + target + ": " + describeCell(...cell);
  }
  if (view.kind === "column") return whole;
  if (piece.token >= view.to) return quoted(piece.text) + " comes after " + target + " and cannot be its cause";
  return quoted(piece.text) + " was held fixed";
}

let painted = null;
function render() {
  const view = viewOf(wanted());
  const state = [commonScale, root.className, pinned !== null].join();
  if (painted === null || painted.view !== view || painted.state !== state) {
    paint(view);
    drawPanel(view);
    painted = { view, state };
  }
  at("details").textContent = describe(view);
}

/* Pointing, clicking, keys -------------------------------------------------------------------- */

const pieceAt = (side, target) => {
  const el = target.closest && target.closest(".piece");
  return el && at(side).contains(el) ? pieces[side][Number(el.dataset.i)] : null;
};
const pinRows = (a, b) => { pinned = { kind: "rows", from: Math.min(a, b), to: Math.max(a, b) + 1 }; };

function toggle(piece) {
  const spec = piece.side === "answer"
    ? { kind: "rows", from: piece.token, to: piece.token + 1 } : { kind: "column", index: piece.feature };
  const same = pinned && pinned.kind === spec.kind && pinned.index === spec.index
    && pinned.from === spec.from && pinned.to === spec.to;
  pinned = same ? null : spec;
  if (piece.side === "answer") anchor = piece.token;
}

function focusPiece(piece, byKey = false) {
  for (const other of pieces[piece.side]) if (other.el.tabIndex === 0) other.el.tabIndex = -1;
  piece.el.tabIndex = 0;
  piece.el.focus({ preventScroll: true, focusVisible: byKey });
}

/* The piece above or below: the nearest one of the next line. */
function lineStep(all, i, way) {
  const here = all[i].el, row = (k) => all[k].el.offsetTop;
  let k = i + way;
  while (all[k] && row(k) === here.offsetTop) k += way;
  if (!all[k]) return i;
  const line = row(k), away = (j) => Math.abs(all[j].el.offsetLeft - here.offsetLeft);
  let best = k;
  for (; all[k] && row(k) === line; k += way) if (away(k) < away(best)) best = k;
  return best;
}

function keyTarget(key, all, i) {
  switch (key) {
    case "ArrowRight": return Math.min(i + 1, all.length - 1);
    case "ArrowLeft": return Math.max(i - 1, 0);
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
  const next = keyTarget(event.key, pieces[side], Number(piece.el.dataset.i));
  if (next >= 0) {
    const to = pieces[side][next];
    if (side === "answer" && event.shiftKey) {
      if (!pinned || pinned.kind !== "rows") anchor = piece.token;
      pinRows(anchor, to.token);
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
  if (!piece || !getSelection().isCollapsed) return; /* text was being selected, to be copied */
  toggle(piece);
  focusPiece(piece);
  render();
});

let dragging = null; /* {from, moved} while the button is down on the answer */
at("answer").addEventListener("pointerdown", (event) => {
  const piece = pieceAt("answer", event.target);
  if (!piece || event.button !== 0) return;
  if (event.pointerType === "mouse") event.preventDefault(); /* no selection of text by dragging */
  dragging = { from: event.shiftKey && pinned ? anchor : piece.token, moved: event.shiftKey && pinned !== null, piece };
  if (dragging.moved) pinRows(dragging.from, piece.token);
  render();
});
at("answer").addEventListener("pointerover", (event) => {
  const piece = pieceAt("answer", event.target);
  if (!dragging || !piece || (!dragging.moved && piece.token === dragging.from)) return;
  dragging.moved = true;
  anchor = dragging.from;
  pinRows(dragging.from, piece.token);
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

/* What is kept stays kept: as the part that holds it, or the first that it holds. */
function setLevel(number) {
  const first = pinned && pinned.kind === "column" ? shown.partOf.indexOf(pinned.index) : -1;
  shown = levels[number]();
  views.clear();
  cellPeak = peakOfCells();
  at("prompt").replaceChildren();
  promptPieces = pieces.prompt = layOutPrompt();
  if (first >= 0) pinned = { kind: "column", index: shown.partOf[first] };
  pointed = null;
  remeasure();
}

function offerLevels() {
  [finest.name, ...(data.levels || []).map((level) => level.name).reverse()].forEach((name, i) => {
    const label = make("label"), input = make("input");
    Object.assign(input, { type: "radio", name: "level", value: i, checked: i === 0 });
    label.append(input, make("span", "", name));
    at("levels").append(label);
  });
  at("levels").hidden = levels.length < 2;
}

function clear() { pinned = null; pointed = null; render(); }
at("clear").addEventListener("click", clear);
addEventListener("keydown", (event) => { if (event.key === "Escape") clear(); });

at("tools").addEventListener("change", (event) => {
  if (event.target.name === "level") setLevel(Number(event.target.value));
  else if (event.target.name === "colour") root.classList.replace(...(event.target.value === "absolute" ? ["signed", "absolute"] : ["absolute", "signed"]));
  else commonScale = event.target.value === "common";
  render();
});

/* Once ---------------------------------------------------------------------------------------- */

function about() {
  const named = { log_prob: "log-probability", prob: "probability", logit: "logit" };
  const value = named[data.attr_target] || data.attr_target;
  const evaluations = data.n_evaluations === null || data.n_evaluations === undefined ? ""
    : (data.estimate ? "an estimate from " : "") + data.n_evaluations.toLocaleString("en") + " evaluations";
  return [data.method, evaluations, value + (unit && unit !== "logits" ? " in " + unit : "")].filter(Boolean).join(" · ");
}

function spelled(value) {
  if (typeof value !== "object") return String(value);
  const flat = !Array.isArray(value) && Object.values(value).every((item) => typeof item !== "object");
  return flat ? Object.entries(value).map((pair) => pair.join(" ")).join(", ") : JSON.stringify(value);
}

function provenance() {
  const entries = { method: data.method, attr_target: data.attr_target, n_evaluations: data.n_evaluations, estimate: data.estimate, ...data.provenance };
  for (const [name, value] of Object.entries(entries)) {
    if (value === null || value === undefined) continue;
    at("provenance").append(make("dt", "", name), make("dd", "", spelled(value)));
  }
}

root.classList.add("signed");
at("about").textContent = about();
provenance();
offerLevels();
render();
/* In a notebook the page sits in a frame that should be as high as its content. */
let frame = null;
try { frame = window.frameElement; } catch { /* a frame of another origin keeps its height */ }
if (window.parent !== window) root.classList.add("framed");
new ResizeObserver(() => {
  remeasure();
  if (frame) frame.style.height = Math.ceil(document.body.getBoundingClientRect().height) + "px";
}).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", remeasure);
})();
