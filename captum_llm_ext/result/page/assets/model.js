/* Data: matrices, their levels, and the sums that a view shows. */

const data = JSON.parse(document.getElementById("attribution-data").textContent);

const matrix = (rows) => rows && rows.map((row) => {
  if (!row) return null;
  const numbers = new Float64Array(row.length);
  row.forEach((x, j) => { numbers[j] = x === null ? NaN : x; });
  return numbers;
});
let block = "both"; /* block of the causes: "prompt", "answer" or "both" */
const nTarget = data.output_tokens.length, nPrompt = data.input_tokens.length;
const nOutput = data.output_features ? data.output_features.length : 0;
const MATRICES = ["token_attr", "token_attr_se", "output_attr", "output_attr_se"];
/* Fields that depend on the explained value: a result may hold two, and the page switches between them. */
const NUMBERS = [...MATRICES, "attr_target", "full_values", "empty_values", "sums", "noise_floor", "marked_beyond", "about", "total", "answer"];
data.noise_floor ??= (data.provenance || {}).noise_floor ?? null;
const readings = [data, data.other].filter(Boolean).map((told) => {
  const numbers = Object.fromEntries(NUMBERS.map((name) => [name, told[name] ?? null]));
  for (const name of MATRICES) numbers[name] = matrix(numbers[name]);
  return numbers;
});

/* Estimates without a standard error: they cannot be distinguished from noise. */
const hasUnknownError = (value, error) => Boolean(data.estimate) && value !== 0 && !Number.isFinite(error);

let unit, hasErrors, nUnknownErrors, floor, beyond;
function derive() {
  beyond = data.marked_beyond ?? 1.96; /* standard errors, corrected for multiple comparisons */
  unit = { log_prob: "nats", contrast: "nats", logit: "logits", prob: "" }[data.attr_target] ?? "";
  /* Exact values and those without a standard error show none. */
  hasErrors = [data.token_attr_se, data.output_attr_se].some((rows) => (rows || []).some((row) => row && row.some((error) => error > 0)));
  nUnknownErrors = [["token_attr", "token_attr_se"], ["output_attr", "output_attr_se"]].reduce((n, [attr, se]) => n + (data[attr] || []).reduce((m, row, t) => {
    const spread = data[se] && data[se][t];
    return m + (row ? row.reduce((k, x, j) => k + (Number.isFinite(x) && hasUnknownError(x, spread ? spread[j] : NaN) ? 1 : 0), 0) : 0);
  }, 0), 0);
  /* One per token; the largest is used for all. */
  floor = Math.max(0, ...[data.noise_floor].flat().map(known).filter(Number.isFinite));
}

const known = (x) => (x === null || x === undefined ? NaN : x);
Object.assign(data, readings[0]);
derive();
const total = (xs, from, to) => {
  let sum = 0;
  for (let t = from; t < to; t++) sum += known(xs ? xs[t] : null);
  return sum;
};
const peak = (values, start = 0) => {
  let most = start;
  for (const x of values) if (Math.abs(x) > most) most = Math.abs(x);
  return most;
};
const range = (n) => Array.from({ length: n }, (_, i) => i);

/* Levels: features, or larger parts made of them ------------------------------------------------ */

/* Sums over the columns of each part; `from` and `to` add errors in quadrature. */
const added = (rows, partOf, width, from = (x) => x, to = (x) => x) => rows && rows.map((row) => {
  const sums = new Float64Array(width);
  if (row) row.forEach((x, j) => { sums[partOf[j]] += from(x); });
  else sums.fill(NaN);
  return sums.map(to);
});
const addedErrors = (rows, partOf, width) => added(rows, partOf, width, (x) => x * x, Math.sqrt);

/* From fine to coarse; levels of one part are left out. */
const around = data.around || {};
const promptLevels = [
  { name: (data.provenance || {}).unit || "finest", side: "prompt", names: data.input_tokens, around: around.prompt, partOf: range(nPrompt), attr: data.token_attr, se: data.token_attr_se },
  ...(data.levels || []).filter(({ parts }) => parts.length > 1)
    .map(({ name, parts, part_of }) => ({ name, key: name, side: "prompt", names: parts, partOf: part_of })).reverse(),
];

/* Parts of the answer are runs of tokens (rows) and groups of features (columns). */
const answerLevels = [
  { name: "token", side: "answer", runs: range(nTarget).map((t) => [t, t + 1]), names: data.output_features || [], around: around.output,
    columns: data.output.map((piece) => (nOutput ? piece.feature : null)), attr: data.output_attr, se: data.output_attr_se },
  ...(data.output_levels || []).map(answerLevel).reverse(),
];
function answerLevel({ name, part_of: partOf }) {
  const runs = [], partOfFeature = [];
  data.output.forEach((piece, t) => {
    if (t && partOf[t] === partOf[t - 1]) runs[runs.length - 1][1] = t + 1;
    else runs.push([t, t + 1]);
    if (piece.feature !== null) partOfFeature[piece.feature] = runs.length - 1;
  });
  const owning = new Set(partOfFeature);
  const names = runs.map(([from, to]) => data.output.slice(from, to).map((piece) => piece.text).join(""));
  return { name, key: name, side: "answer", runs, names, partOf: partOfFeature, columns: runs.map((_, i) => (nOutput && owning.has(i) ? i : null)) };
}

/* A part can cause only tokens after the end of one of its features. */
function withEnds(level) {
  const last = new Array(nOutput).fill(-1);
  data.output.forEach((piece, t) => { if (piece.feature !== null) last[piece.feature] = t; });
  level.firstEnd = new Array(level.names.length).fill(Infinity);
  last.forEach((t, j) => {
    const column = level.partOf ? level.partOf[j] : j;
    level.firstEnd[column] = Math.min(level.firstEnd[column], t);
  });
}
function filled(level, attr, se) {
  if (level.attr === undefined) {
    level.attr = added(attr, level.partOf, level.names.length);
    level.se = addedErrors(se, level.partOf, level.names.length);
  }
  if (level.peak === undefined) level.peak = (level.attr || []).reduce((most, row) => (row ? peak(row, most) : most), 0);
  return level;
}
const promptLevel = (i) => filled(promptLevels[i], data.token_attr, data.token_attr_se);
function answerLevelAt(i) {
  const level = filled(answerLevels[i], data.output_attr, data.output_attr_se);
  if (!level.firstEnd) withEnds(level);
  return level;
}

/* The shown levels: initially the coarsest of the prompt, and the answer's as given by the result. */
const FIRST = { prompt: promptLevels.length - 1, answer: Math.max(0, answerLevels.findIndex(({ name }) => name === (data.answer_unit || "token"))) };
let prompt = promptLevel(FIRST.prompt), answer = answerLevelAt(FIRST.answer);
const sentences = answerLevels.find(({ name }) => name === "sentence");
/* The sentences that contain a span of the answer, or null if the span is whole sentences. */
function sentenceOf(view) {
  if (!sentences) return null;
  const runs = sentences.runs.filter(([from, to]) => from < view.to && to > view.from);
  const span = [runs[0][0], runs[runs.length - 1][1]];
  return span[0] === view.from && span[1] === view.to ? null : span;
}

/* Switches to another value of the result. */
function useReading(number) {
  const shown = [promptLevels.indexOf(prompt), answerLevels.indexOf(answer)];
  Object.assign(data, readings[number]);
  derive();
  readKnownErrors();
  for (const level of [...promptLevels, ...answerLevels]) { delete level.attr; delete level.se; delete level.peak; }
  Object.assign(promptLevels[0], { attr: data.token_attr, se: data.token_attr_se });
  Object.assign(answerLevels[0], { attr: data.output_attr, se: data.output_attr_se });
  [prompt, answer] = [promptLevel(shown[0]), answerLevelAt(shown[1])];
}

/* Views ------------------------------------------------------------------------------------------ */

/* Known errors of sums; others are added in quadrature, since no covariances are stored. */
const knownErrors = new Map();
const sumKey = (side, key, from, to) => [side, from, to, key ?? ""].join(" ");
function readKnownErrors() {
  knownErrors.clear();
  for (const { side, level, spans, se } of data.sums || []) {
    spans.forEach(([from, to], i) => knownErrors.set(sumKey(side, level, from, to), Float64Array.from(se[i], known)));
  }
}
readKnownErrors();
/* The whole answer, held as it is, is known by itself at one level of the prompt. */
const wholeAt = (level, from, to) => (data.answer && level.side === "prompt" && level.name === data.answer.level && from === 0 && to === nTarget ? data.answer : null);
function wholeSeries(level, answer) {
  const value = new Float64Array(level.names.length), error = new Float64Array(level.names.length);
  for (const part of answer.parts) {
    for (const column of part.columns) {
      const i = level.partOf[column];
      value[i] = part.attribution;
      error[i] = known(part.standard_error);
    }
  }
  return { value, error, count: nTarget };
}
const told = (level, from, to) => knownErrors.get(sumKey(level.side, level.key, from, to));
/* Sums whose terms may be dependent, although their errors are added in quadrature. */
const guessed = (level, from, to) => (told(level, from, to) || wholeAt(level, from, to) ? [] : [to - from > 1 ? "tokens" : "", level.key ? "parts" : ""].filter(Boolean));

function sumRows(level, from, to) {
  const whole = wholeAt(level, from, to);
  if (whole) return wholeSeries(level, whole);
  const { attr, se } = level, width = level.names.length;
  const value = new Float64Array(width), error = new Float64Array(width).fill(se ? 0 : NaN);
  for (let t = from; t < to; t++) {
    const row = attr[t], spread = se && se[t];
    for (let j = 0; j < width; j++) {
      value[j] += row[j];
      if (se) error[j] += (spread ? spread[j] : NaN) ** 2;
    }
  }
  return { value, error: told(level, from, to) || error.map(Math.sqrt), count: to - from };
}
const none = { value: new Float64Array(0), error: new Float64Array(0), count: 1 };
/* Causes of tokens in both blocks: direct effects or total shares. */
const causesOf = (from, to) => (isThrough() ? sharesOf(from, to)
  : { prompt: sumRows(prompt, from, to), output: nOutput ? sumRows(answer, from, to) : none });

function rowsView(from, to) {
  const view = {
    kind: "rows", from, to, ...causesOf(from, to),
    guessed: new Set(isThrough() ? [] : [...guessed(prompt, from, to), ...(nOutput ? guessed(answer, from, to) : [])]),
  };
  view.piece = answer.runs.findIndex(([a, b]) => a === from && b === to);
  return view;
}
const isWhole = (view) => view.from === 0 && view.to === nTarget && nTarget > 1;

/* The effect of one column on every part of the answer. */
function columnOver(level, index) {
  const { attr, se } = level;
  const value = new Float64Array(answer.runs.length), error = new Float64Array(answer.runs.length);
  answer.runs.forEach(([from, to], p) => {
    const exact = told(level, from, to);
    for (let t = from; t < to; t++) {
      value[p] += attr[t] ? attr[t][index] : NaN;
      error[p] += (se && se[t] ? se[t][index] : NaN) ** 2;
    }
    if (exact) error[p] = exact[index] ** 2;
  });
  return { value, error: error.map(Math.sqrt), count: 1 };
}
const columnView = (index) => ({
  kind: "column", index, tokens: isThrough() ? shareOver(index) : columnOver(prompt, index),
  guessed: new Set(isThrough() ? [] : answer.runs.flatMap(([from, to]) => guessed(prompt, from, to))),
});
function shareOver(index) {
  const shares = answer.runs.map(([from, to]) => sharesOf(from, to).prompt);
  const of = (name) => Float64Array.from(shares, (own) => own[name][index]);
  return { value: of("value"), error: of("error"), count: 1, isShare: true, hasUnknownError: shares.some((own) => own.hasUnknownError) };
}

/* The effect of an earlier part of the answer on later ones. */
function effectsOf(view) {
  const column = !isThrough() && view.kind === "rows" && view.piece >= 0 && !isWhole(view) ? answer.columns[view.piece] : null;
  return column === null ? null : columnOver(answer, column);
}

/* Magnitudes have no sign. */
const isUnsigned = Boolean(data.is_unsigned);

const within = (series, i) => Math.abs(series.value[i]) < beyond * series.error[i];
/* Below the model's noise floor, which grows with the square root of the number of terms. */
const isNoise = (series, i) => Math.abs(series.value[i]) < floor * Math.sqrt(series.count);
const isUnknown = (series, i) => hasUnknownError(series.value[i], series.error[i]);
const SINGLE = 1.96; /* standard errors above which a share is significant */
const isUnsureShare = (series, i) => series.value[i] > 0 && !series.hasUnknownError && !(series.value[i] >= SINGLE * series.error[i]);
const isFaint = (series, i) => (series.isShare ? isUnsureShare(series, i) : within(series, i) || isNoise(series, i) || isUnknown(series, i));

/* A scale per block: in most answers, attributions to earlier words are far larger than to the prompt. */
const ownPeak = (view, side) => peak(view.kind === "column" ? view.tokens.value : side === "prompt" ? view.prompt.value : view.output.value);
const commonPeak = (...sides) => (isThrough() ? 1 : Math.max(...sides.map((side) => (side === "prompt" ? prompt : answer).peak)));

/* The strongest links of a view: from a column to a part of the answer. */
const MOST_LINKS = 12, LEAST_LINK = 0.08;
function linksOf(view) {
  if (isThrough()) return chainLinks(view);
  const found = [];
  const offer = (side, column, piece, value, error) => {
    if (block !== "both" && block !== side) return;
    const size = Math.abs(value);
    if (!(size > 0) || size < beyond * error || size < floor || hasUnknownError(value, error)) return;
    if (found.length === MOST_LINKS && size <= Math.abs(found[MOST_LINKS - 1].value)) return;
    let k = found.length === MOST_LINKS ? MOST_LINKS - 1 : found.length;
    for (; k > 0 && Math.abs(found[k - 1].value) < size; k--) found[k] = found[k - 1];
    found[k] = { side, column, piece, value };
  };
  if (view.kind === "column") {
    view.tokens.value.forEach((value, p) => offer("prompt", view.index, p, value, view.tokens.error[p]));
  } else {
    answer.runs.forEach(([a, b], p) => {
      if (b <= view.from || a >= view.to) return;
      const from = Math.max(a, view.from), to = Math.min(b, view.to);
      const whole = view.piece === p;
      const own = whole ? view.prompt : sumRows(prompt, from, to);
      own.value.forEach((value, j) => offer("prompt", j, p, value, own.error[j]));
      if (!nOutput) return;
      const before = whole ? view.output : sumRows(answer, from, to);
      before.value.forEach((value, j) => { if (answer.columns[p] !== j) offer("answer", j, p, value, before.error[j]); });
    });
  }
  const most = { prompt: 0, answer: 0 };
  for (const { side, value } of found) most[side] = Math.max(most[side], Math.abs(value));
  return found.filter((link) => Math.abs(link.value) >= LEAST_LINK * most[link.side]);
}
const MOST_CELLS = 3e6; /* above this, finding the links of a whole answer takes too long */
const hasLinks = (view) => view.kind === "column" || (view.to - view.from) * (nPrompt + nOutput) <= MOST_CELLS;
