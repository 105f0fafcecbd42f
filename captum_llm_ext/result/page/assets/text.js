/* Running text: pieces, bubbles, colours, and marks beside the scroll bar. */

/* White space around a piece is not coloured; a feature of white space alone is coloured and marked. */
function fill(el, text, live) {
  const lead = text.match(/^\s*/)[0];
  const ink = make("span", "ink");
  if (lead.length === text.length) {
    text.split("\n").forEach((part, i) => {
      if (i) ink.append(live ? make("span", "newline") : "", "\n");
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

/* The parent of the next piece: the bubble of its turn, or the box itself. */
function bubbles(box) {
  let bubble = null;
  return (role) => {
    if (!role || role === "template") { bubble = null; return box; }
    if (!bubble || bubble.dataset.role !== role) {
      bubble = make("div", "turn");
      bubble.dataset.role = role;
      bubble.setAttribute("role", "group");
      bubble.setAttribute("aria-label", role);
      bubble.dir = "auto";
      box.append(bubble);
    }
    return bubble;
  };
}

/* Template text between messages is folded to one line until clicked. */
const MOST_TEMPLATE = 24;
function fold(el) {
  el.classList.add("folded");
  el.title = "text of the chat template, the same for every chat: click to see all of it";
  el.addEventListener("click", () => { el.classList.toggle("folded"); remeasure(); });
}

function layOut(box, side, pieces, placeOf) {
  const made = [];
  for (const { text, feature, role, from, to } of pieces) {
    const live = side === "answer" || feature !== null;
    const el = make("span", live ? "piece" : "fixed");
    if (role === "template") el.classList.add("template");
    if (!live && role === "template" && text.length > MOST_TEMPLATE) fold(el);
    el.setAttribute("role", "option");
    const ink = fill(el, text, live);
    placeOf(role).append(el);
    if (!live) { el.setAttribute("aria-disabled", "true"); continue; }
    if (!text.trim()) el.setAttribute("aria-label", /\n/.test(text) ? "new line" : text ? "space" : "part of a character");
    el.dataset.i = made.length;
    el.tabIndex = -1;
    made.push({ el, ink, side, feature, from, to, text, name: side === "answer" ? nameOfRun(from, to) : text, i: made.length, drawn: "", level: 0, chosen: null });
  }
  if (made.length) made[0].el.tabIndex = 0;
  return made;
}

/* Adjacent pieces of one prompt feature are merged; those of the answer are not. */
function joined(pieces) {
  const out = [];
  for (const { text, feature, role } of pieces) {
    const last = out[out.length - 1];
    if (last && last.feature === feature && last.role === role) last.text += text;
    else out.push({ text, feature, role });
  }
  return out;
}

const isChat = data.prompt.some((piece) => piece.role && piece.role !== "template");
if (data.prompt_layout === "list") at("prompt").classList.add("list");
const nCharacters = [...data.prompt, ...data.output].reduce((n, piece) => n + piece.text.length, 0);
if (nCharacters < 400 && !isChat) root.classList.add("brief");
if (isChat) for (const side of ["prompt", "answer"]) at(side).classList.add("chat");

const pieces = { prompt: [], answer: [] };
const owners = { prompt: [], answer: [] }; /* per column its pieces */
function layOutSide(side) {
  const box = at(side), parts = side === "prompt"
    ? joined(data.prompt.map(({ text, feature, role }) => ({ text, role, feature: feature === null ? null : prompt.partOf[feature] })))
    : answer.runs.map(([from, to], i) => {
      const template = data.output.slice(from, to).every((piece) => piece.role === "template");
      const role = template ? "template" : isChat ? "assistant" : undefined;
      return { text: textOf(from, to), feature: answer.columns[i], role, from, to };
    });
  box.replaceChildren();
  box.dir = directionOf(parts.map((part) => (part.feature === null && side === "prompt" ? "" : part.text)).join(""));
  pieces[side] = layOut(box, side, parts, bubbles(box));
  owners[side] = [];
  for (const piece of pieces[side]) if (piece.feature !== null) (owners[side][piece.feature] ||= []).push(piece);
}
layOutSide("prompt");
layOutSide("answer");

/* Marks of the strong parts of a long text, beside its scroll bar. */
function ruler(side) {
  const box = at(side), canvas = box.nextElementSibling;
  let places = [], colours = [];
  const measure = () => {
    /* Reading styles while painting would compute them twice. */
    const style = getComputedStyle(root);
    colours = ["--up", "--down", "--size"].map((name) => "rgb(" + style.getPropertyValue(name) + ")");
    const long = box.scrollHeight > box.clientHeight + 4 && box.clientHeight > 0;
    canvas.hidden = !long;
    canvas.width = 12;
    canvas.height = box.clientHeight;
    const top = box.getBoundingClientRect().top - box.scrollTop;
    places = long ? pieces[side].map((piece) => (piece.el.getBoundingClientRect().top - top) / box.scrollHeight) : [];
  };
  const draw = () => {
    if (canvas.hidden) return;
    const pen = canvas.getContext("2d"), absolute = isSized();
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pieces[side].forEach((piece, i) => {
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
const rulers = [ruler("prompt"), ruler("answer")];

/* The series and index that colour a piece, or null if it has no number. */
function cellOf(view, piece) {
  if (view.kind === "column") return piece.side === "answer" ? [view.tokens, piece.i] : null;
  if (block !== "both" && block !== piece.side) return null;
  if (piece.side === "prompt") return [view.prompt, piece.feature];
  if (piece.feature === null || answer.firstEnd[piece.feature] >= view.to - 1) return null;
  return [view.output, piece.feature];
}
function isChosen(view, piece) {
  if (view.kind === "column") return piece.side === "prompt" && piece.feature === view.index;
  return piece.side === "answer" && !isWhole(view) && piece.from < view.to && piece.to > view.from;
}

function paintPiece(view, piece, most) {
  const cell = cellOf(view, piece), chosen = isChosen(view, piece);
  let level = 0, sure = false;
  if (cell) {
    const [series, i] = cell, faint = isFaint(series, i);
    level = most > 0 ? Math.max(-1, Math.min(1, series.value[i] / most)) || 0 : 0;
    if (faint) level *= 0.3;
    sure = !faint && Math.abs(level) >= 0.1;
  }
  level = Math.round(level * 40) / 40;
  const later = view.kind === "rows" && piece.side === "answer" && !chosen && piece.from >= view.to;
  const drawn = "ink" + (level > 0 ? " up" : level < 0 ? " down" : "") + (sure ? " sure" : "")
    + (chosen ? " chosen" : "") + (later ? " later" : "");
  /* Only changed pieces are restyled: restyling thousands of elements is slow. */
  if (piece.drawn !== drawn) piece.ink.className = piece.drawn = drawn;
  if (piece.chosen !== chosen) piece.el.setAttribute("aria-selected", (piece.chosen = chosen));
  if (piece.level !== level && level) piece.ink.style.setProperty("--a", Math.abs(level));
  piece.level = level;
}

const peakOf = (view, side, isCommon) => (isCommon
  ? Math.max(commonPeak(view.kind === "column" ? "prompt" : side), ownPeak(view, side)) : ownPeak(view, side));
function paint(view, isCommon) {
  const most = { prompt: peakOf(view, "prompt", isCommon), answer: peakOf(view, "answer", isCommon) };
  for (const side of ["prompt", "answer"]) for (const piece of pieces[side]) paintPiece(view, piece, most[side]);
  for (const { draw } of rulers) draw();
  const absolute = isSized(), what = data.attr_target === "log_prob" ? "probability" : nameOfValue(data.attr_target);
  at("low").textContent = absolute ? "nothing" : "lowers ←";
  at("ramp").textContent = isThrough() ? "share in the end" : absolute ? "" : what;
  at("high").textContent = absolute ? "most" : "→ raises";
  const shown = view.kind === "column" ? [["", most.answer]]
    : ["prompt", "answer"].filter((side) => (side === "prompt" || most.answer > 0) && (block === "both" || block === side)).map((side) => [side === "prompt" ? "prompt " : "answer ", most[side]]);
  at("full").textContent = "full colour: " + shown.map(([side, x]) => side + (isThrough() ? percentOf(x) : withUnit(plain(x, x)))).join(", ");
}
