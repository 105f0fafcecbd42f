/* Panel of the selection: details, causes in two blocks, the bridge from the empty to the full value. */

/* One line of the bridge; `span` is [low, high] of the whole bridge. */
function step(label, from, to, span, kind, aside) {
  const line = make("div", "step" + (kind === "point" ? " end" : ""));
  const name = make("span", "", label), track = make("div", "track"), mark = make("i");
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
  if (aside) line.append(make("small", "", aside)); /* below the bar, so that it does not cover the mark */
  return line;
}

const sum = (values) => values.reduce((a, b) => a + b, 0);
const LEAST_GAP = 0.005; /* gaps below this share of the bridge are not shown */

/* The strongest routes to the selection, as a list. */
function routeList(view) {
  const lines = routesTo(view).map((route) => {
    const line = make("li", "", stops(view, route).join(" → ") + (route.column === null ? " (begins there)" : "") + "\u2002");
    line.append(make("b", "", percentOf(route.share)));
    return line;
  });
  if (!lines.length) return [];
  const list = make("ol", "ways");
  list.append(...lines);
  return [make("h2", "", "Strongest chains"), list];
}

/* From the answer after none of the prompt to the answer after all of it. */
function bridgeOfWhole(view, { empty_value: empty, full_value: full }) {
  if (![empty, full].every(Number.isFinite)) return [];
  const span = [Math.min(empty, full), Math.max(empty, full)];
  return [
    make("h2", "", "The answer, held as it is" + (unit ? ", " + unit : "")),
    step("no prompt", empty, empty, span, "point", share(empty, view)),
    step("prompt", empty, full, span),
    step("whole prompt", full, full, span, "point", share(full, view)),
  ];
}

function bridge(view) {
  if (isThrough()) return routeList(view);
  const whole = wholeAt(prompt, view.from, view.to);
  if (whole) return bridgeOfWhole(view, whole);
  const empty = total(data.empty_values, view.from, view.to);
  const full = total(data.full_values, view.from, view.to);
  const byPrompt = empty + sum(view.prompt.value);
  const byOutput = byPrompt + sum(view.output.value);
  const points = [empty, byPrompt, byOutput, full].filter(Number.isFinite);
  if (points.length < 4) return [];
  const span = [Math.min(...points), Math.max(...points)];
  const isGap = Math.abs(full - byOutput) > LEAST_GAP * (span[1] - span[0]);
  const steps = [
    step("nothing given", empty, empty, span, "point", share(empty, view)),
    step("prompt", empty, byPrompt, span),
    byOutput !== byPrompt ? step("answer so far", byPrompt, byOutput, span) : "",
    isGap ? step("not attributed", byOutput, full, span) : "",
    step("everything given", full, full, span, "point", share(full, view)),
  ];
  return [make("h2", "", "From nothing given to everything given" + (unit ? ", " + unit : "")), ...steps];
}

/* Unresolved features share evenly; known for single features only. */
const groupOf = new Map();
for (const group of data.unresolved || []) for (const column of group) groupOf.set(column, group.length);
function sharing(side, column) {
  const level = side === "prompt" ? prompt === promptLevels[0] : answer === answerLevels[0];
  return level ? groupOf.get(side === "prompt" ? column : nPrompt + column) || 0 : 0;
}

const nameOf = (side, column) => (side === "prompt" ? prompt.names : answer.names)[column];
/* The whole word of a fragment. */
function aroundOf(side, column) {
  const level = side === "prompt" ? prompt : answer;
  return (level.around && level.around[column]) || ["", ""];
}

const bySize = (a, b) => Math.abs(b.value) - Math.abs(a.value);
function rowsOf(series, side, piecesOf, textOf, aroundOf_) {
  const rows = [];
  series.value.forEach((value, i) => {
    if (Math.abs(value) > 0) rows.push({ series, i, value, side, piecesOf, textOf, around: aroundOf_ || (() => ["", ""]) });
  });
  return rows.sort(bySize);
}
/* The causes of a view in one block, the strongest first. */
const causesIn = (view, side) => rowsOf(side === "prompt" ? view.prompt : view.output, side,
  (j) => owners[side][j] || [], (j) => nameOf(side, j), (j) => aroundOf(side, j));
const whereItMattered = (view) => rowsOf(view.tokens, "answer", (p) => [pieces.answer[p]], (p) => pieces.answer[p].name);

const mean = (numbers) => numbers.reduce((a, b) => a + b, 0) / Math.max(numbers.length, 1);
/* Where bars begin: zero is at the left unless something lowers. */
function axisOf(rows) {
  const low = Math.max(0, ...rows.map((row) => -row.value)), high = Math.max(0, ...rows.map((row) => row.value));
  const width = low + high || 1;
  return { zero: (96 * low) / width + 2, share: 96 / width };
}

const numberText = (series, value, most) => (series.isShare ? percentOf(value) : signed(value, most));

function tableRow(view, row, most, axis) {
  const { series, i, value, side } = row, line = make("tr", isFaint(series, i) ? "unsure" : "");
  const text = row.textOf(i), [before, after] = row.around(i);
  const what = make("td", "what"), button = make("button", "");
  const barCell = make("td", "bar"), bar = make("i", value > 0 ? "up" : "down");
  const number = make("td", "value", numberText(series, value, most));
  if (before || after) button.append(make("span", "around", before), make("b", "", visible(text)), make("span", "around", after));
  else button.textContent = visible(text);
  if (text.length > LONG_TEXT) button.className = "passage";
  button.type = "button";
  button.dir = "auto";
  button.title = text;
  bar.style.left = (value > 0 ? axis.zero : axis.zero - axis.share * -value) + "%";
  bar.style.width = axis.share * Math.abs(value) + "%";
  if (series.isShare) {
    const [digits, sign] = number.textContent.split("\u00a0");
    number.replaceChildren(digits, make("small", "", spreadOf(series, i)), "\u00a0" + sign);
  } else number.append(make("small", "", plusMinus(series.error[i], most)));
  const times = series.isShare ? "" : factor(value, 1);
  if (times && view.kind !== "column") number.title = times;
  what.append(button);
  barCell.append(bar);
  const isItself = view.kind === "rows" && side === "answer" && answer.columns[view.piece] === i;
  const shared = view.kind === "rows" && !series.isShare && sharing(side, i);
  line.append(what, make("td", "where", (isItself ? "itself" : "#" + (i + 1)) + (shared ? " ≈" : "")), barCell, number);
  const found = row.piecesOf(i);
  const find = (on) => () => found.forEach((piece) => piece.ink.classList.toggle("found", on));
  line.addEventListener("pointerenter", find(true));
  line.addEventListener("pointerleave", find(false));
  button.addEventListener("focus", find(true));
  button.addEventListener("blur", find(false));
  button.addEventListener("click", () => found[0] && found[0].el.scrollIntoView({ block: "center" }));
  return line;
}

const MOST_ROWS = 7, LEAST_ROW = 0.02; /* of the strongest: smaller causes are summed up */
const LONG_TEXT = 16; /* characters from which a cause may take several lines */
function fillTable(table, view, rows) {
  const most = peak(rows.map((row) => row.value));
  const worth = rows.filter((row) => Math.abs(row.value) >= LEAST_ROW * most).slice(0, MOST_ROWS);
  const shown = rows.slice(0, rows.length - worth.length === 1 ? rows.length : worth.length), rest = rows.slice(shown.length), axis = axisOf(shown);
  const lines = shown.map((row) => tableRow(view, row, most, axis));
  if (rest.length) {
    const line = make("tr", "rest"), label = make("td", "what", rest.length + (rest.length === 1 ? " other" : " others together"));
    label.colSpan = 3;
    line.append(label, make("td", "value", numberText(rest[0].series, sum(rest.map((row) => row.value)), most)));
    lines.push(line);
  }
  table.tBodies[0].replaceChildren(...lines);
}

/* Effects of the selected part on later parts of the answer. */
function drawEffects(view) {
  const effects = effectsOf(view), rows = [];
  if (effects) effects.value.forEach((value, p) => {
    if (p !== view.piece && Math.abs(value) > 0 && !isFaint(effects, p)) {
      rows.push({ series: effects, i: p, value, side: "answer", piecesOf: (k) => [pieces.answer[k]], textOf: (k) => pieces.answer[k].name, around: () => ["", ""] });
    }
  });
  const most = peak(rows.map((row) => row.value));
  const shown = rows.filter((row) => Math.abs(row.value) >= 0.01 * commonPeak("answer")).sort(bySize).slice(0, 4);
  at("effects").hidden = !shown.length;
  at("effects").tBodies[0].replaceChildren(...shown.map((row) => tableRow({ kind: "effects" }, row, most, axisOf(shown))));
}

/* Notes on shares. */
function notesOnShares(view, shares) {
  const { negative, uncertain } = data.total[prompt.name];
  const hasKnownErrors = shares.some(({ hasUnknownError }) => !hasUnknownError), isUncertain = shares.some(({ error }) => error.some((x) => !(x === 0)));
  const left = [[negative, "for lowering"], [uncertain, "as perhaps noise"]].filter(([share]) => share >= 0.005).map(([share, why]) => percentOf(share) + " " + why);
  return [make("span", "", "Shares of all that led to it, followed back through the answer’s own words to where each chain begins; they sum to 100 %, in rounding. They are no amounts: how far a token would move is another question."
    + (isWhole(view) ? " What nudged the first words counts in all that follows from them: which part an answer came from, “direct” tells." : "")
    + (left.length ? " Left out of the attributions: " + left.join(", ") + "." : "")
    + (!hasKnownErrors ? " Of tokens together that are no part of the answer, no error is told." : isUncertain ? " ± is one standard error; a share that could be noise is pale." : ""))];
}

function notesOn(view) {
  if (isThrough()) return notesOnShares(view, view.kind === "rows" ? [view.prompt, view.output] : [view.tokens]);
  const notes = [], rows = view.kind === "rows";
  if (rows && !nOutput) notes.push("The answer before each token was held fixed: only the prompt is a cause. That asks which part of it the answer came from; without output_unit=None, words of the answer are causes as well.");
  if (isWhole(view) && nOutput) notes.push("Earlier words of the answer are causes, too: this tells which word led to the next. To ask of the prompt alone, which passage it came from, hold the answer fixed: output_unit=None, or --output-unit none.");
  if (isWhole(view) && nOutput && data.answer) notes.push("By " + data.answer.level + " of the prompt, what is attributed is the whole answer, held as it is. All else adds up what led to each token directly, with earlier words of the answer as causes beside it.");
  if (view.guessed.size && hasErrors) notes.push("± is approximate here: the errors of the " + [...view.guessed].join(" and of the ") + " that are added up are taken as independent, which they are not.");
  if (rows && view.to - view.from > 1 && data.attr_target === "prob") notes.push("A sum of the tokens' probabilities, not the probability of all of them.");
  if (data.attr_target === "contrast") notes.push("A contrast: the log-probability of a token less that of its foils together, what it might have been instead. A token without any, such as one that goes on a word, is worth its log-probability.");
  if (nUnknownErrors) notes.push((hasErrors ? "± ?: of these estimates no error is known" : "Of these estimates no error is known") + ", and nothing tells a cause from noise: they are pale.");
  if (hasErrors) notes.push("± is one standard error; what lies within " + beyond.toFixed(2) + " of them could be noise, with so many looked at together, and is pale.");
  if (2 * floor >= 10 ** -decimals(commonPeak("prompt", "answer"))) {
    const n = rows ? view.to - view.from : 1, noise = Number((floor * Math.sqrt(n)).toPrecision(2));
    notes.push("What is below " + withUnit(String(noise)) + ", the noise of the model's own arithmetic" + (n > 1 ? " in " + n + " tokens" : "") + ", is pale" + (hasErrors ? " too." : "."));
  }
  if (groupOf.size) notes.push("≈ " + groupOf.size + " features were not told apart within the budget: groups of them share evenly.");
  if (rows && data.fixed_share) notes.push("Fixed text, such as the token that texts begin with, has " + Math.round(100 * mean(data.fixed_share.slice(view.from, view.to))) + "\u00a0% of what all tokens " + (data.attr_target === "attention" ? "take." : "add."));
  if (isUnsigned) notes.push("Sizes, which neither raise nor lower.");
  const words = notes.map((note) => make("span", "", note + " "));
  if (root.classList.contains("signed")) words.push(make("span", "screen", "Solid lines raise, dashed ones lower."));
  return words;
}

/* Caption of a table of causes. */
function captionOf(view, side, rows) {
  if (isThrough()) return side === "prompt" ? "In the end, by " + prompt.name + " of the prompt" : "Begins in the answer itself, by " + answer.name;
  const areAllUnknown = rows.length > 0 && rows.every((row) => isUnknown(row.series, row.i));
  const where = side === "prompt" ? "In the prompt, by " + prompt.name : "In the answer so far, by " + answer.name;
  const whole = isWhole(view) && nOutput && data.answer, isIt = whole && wholeAt(prompt, view.from, view.to);
  if (isIt && side === "prompt" && data.answer.gain_in_words) return where + ": " + data.answer.gain_in_words;
  return where + (whole && (side === "answer" || !isIt) ? ", direct effects" : "") + (areAllUnknown ? ": largest estimates, of unknown error" : "");
}

/* Counterfactuals of the selected tokens. */
const MOST_CHANGES = 6;
function drawChanges(view) {
  const all = data.counterfactuals || [], box = at("counterfactuals");
  const found = view.kind === "rows" ? all.filter(({ token }) => token >= view.from && token < view.to)
    : all.filter(({ columns }) => columns.some((j) => prompt.partOf[j] === view.index));
  const lines = found.slice(0, MOST_CHANGES).map((one) => {
    const line = make("li", "", one.said + " The answer then: ");
    line.append(make("q", "", one.answer));
    const mark = (on) => () => one.columns.forEach((j) => (owners.prompt[prompt.partOf[j]] || []).forEach((piece) => piece.ink.classList.toggle("found", on)));
    line.addEventListener("pointerenter", mark(true));
    line.addEventListener("pointerleave", mark(false));
    return line;
  });
  if (found.length > lines.length) lines.push(make("li", "", "… and " + (found.length - lines.length) + " more."));
  if (!lines.length) lines.push(make("li", "", "None that was found is about it."));
  box.hidden = !all.length;
  box.lastElementChild.replaceChildren(...lines);
}

function drawPanel(view, isKept) {
  const rows = view.kind === "rows", count = rows ? view.to - view.from : 0;
  at("chosen-name").textContent = rows ? tokensText(view) : quoted(prompt.names[view.index]);
  at("chosen-place").textContent = !rows ? prompt.name + " " + (view.index + 1) + " of " + prompt.names.length + " in the prompt"
    : count === nTarget ? nTarget + (nTarget === 1 ? " token" : " tokens, summed")
    : count === 1 ? "token " + (view.from + 1) + " of " + nTarget
    : "tokens " + (view.from + 1) + "–" + view.to + " of " + nTarget + ", summed";
  if (rows) at("chosen-place").textContent += ratherThan(view) && "," + ratherThan(view);
  at("clear").hidden = !isKept;
  at("sentence").hidden = !isKept || !rows || !sentenceOf(view);
  at("narrative").hidden = !isWhole(view) && nTarget > 1;
  at("route").textContent = routeText(view);
  at("route").hidden = !at("route").textContent;
  if (rows || isThrough()) at("bridge").replaceChildren(...bridge(view));
  else {
    const whole = !isThrough() && wholeAt(prompt, 0, nTarget);
    const all = whole ? wholeSeries(prompt, whole).value[view.index] : sum(view.tokens.value);
    at("bridge").replaceChildren(make("p", "", withUnit(signed(all, Math.max(peak(view.tokens.value), Math.abs(all)))) + " over the whole answer"));
  }
  const tables = { prompt: rows ? causesIn(view, "prompt") : [], answer: rows ? causesIn(view, "answer") : whereItMattered(view) };
  for (const side of ["prompt", "answer"]) {
    const table = at("top-" + side), found = tables[side];
    table.hidden = !found.length || (rows && block !== "both" && block !== side);
    table.caption.textContent = rows ? captionOf(view, side, found) : isThrough() ? "What it led to in the end" : "Where it mattered most";
    fillTable(table, view, found);
  }
  drawEffects(view);
  drawChanges(view);
  at("note").replaceChildren(...notesOn(view));
}

/* Details line ----------------------------------------------------------------------------------- */

function describeCell(series, i, tokens) {
  if (series.isShare) return shareText(series, i) + " in the end" + (isFaint(series, i) ? ", could be noise" : "");
  const most = peak(series.value), times = factor(series.value[i], tokens);
  return withUnit(signed(series.value[i], most) + plusMinus(series.error[i], most)) + (times ? " = " + times : "")
    + (isUnknown(series, i) ? ", of unknown error" : within(series, i) ? ", could be noise" : isNoise(series, i) ? ", below the model's noise" : "");
}

function describeRows(view) {
  if (isThrough()) {
    const [first] = [...causesIn(view, "prompt"), ...causesIn(view, "answer")].sort(bySize);
    if (!first) return tokensText(view) + ": nothing in particular led to it";
    return tokensText(view) + ": " + shareText(first.series, first.i) + " of what led to it in the end "
      + (first.side === "prompt" ? "is " + promptPart(first.i) : "begins with " + quoted(nameOf("answer", first.i), 24) + " in the answer");
  }
  const whole = wholeAt(prompt, view.from, view.to), isKnown = whole && Number.isFinite(known(whole.empty_value));
  const full = total(data.full_values, view.from, view.to), empty = isKnown ? whole.empty_value : total(data.empty_values, view.from, view.to);
  const most = Math.max(Math.abs(full), Math.abs(empty)), name = tokensText(view);
  if (!Number.isFinite(most)) return name;
  const shownValue = (x) => withUnit(plain(x, most)) + (share(x, view) ? " (" + share(x, view) + ")" : "");
  return name + ratherThan(view) + ": " + shownValue(full) + "; " + shownValue(empty) + (isKnown ? " without the prompt" : " with nothing given");
}

function describeColumn(view) {
  const name = quoted(prompt.names[view.index]), [first] = whereItMattered(view);
  if (!first) return name + (isThrough() ? " led to no token of the answer" : " changed no token of the answer");
  return name + " mattered most for " + quoted(pieces.answer[first.i].name) + ": " + describeCell(view.tokens, first.i, 1);
}

function describe(view, pointed) {
  const whole = view.kind === "rows" ? describeRows(view) : describeColumn(view);
  if (!pointed || (isChosen(view, pointed) && !cellOf(view, pointed))) return whole;
  const target = view.kind === "rows" ? tokensText(view) : quoted(pointed.name);
  const cell = cellOf(view, pointed);
  if (cell) {
    const cause = view.kind === "column" ? prompt.names[view.index] : nameOf(pointed.side, pointed.feature);
    const shared = view.kind === "rows" ? sharing(pointed.side, pointed.feature) : sharing("prompt", view.index);
    const tokens = view.kind === "rows" ? view.to - view.from : pointed.to - pointed.from;
    return (isChosen(view, pointed) ? "Within " + target + ": " : quoted(cause) + " → " + target + ": ")
      + describeCell(...cell, tokens) + (shared ? ", shared evenly by " + shared + " features that were not told apart" : "");
  }
  if (view.kind === "column") return whole;
  if (pointed.side === "answer" && block === "prompt") return whole;
  if (pointed.side === "prompt" && block === "answer") return whole;
  if (pointed.from >= view.to) return quoted(pointed.name) + " comes after " + target + " and cannot be its cause";
  if (isThrough()) return quoted(pointed.name) + " begins no chain to " + target;
  return quoted(pointed.name) + (nOutput && pointed.feature !== null ? " ends " + target + " and cannot be its cause" : " was held fixed");
}
