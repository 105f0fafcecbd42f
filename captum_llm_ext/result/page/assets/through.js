/* What led to the answer in the end: shares, followed back through the words that were written before.
   Per level of the prompt the data has links, each a share of what led directly to a token, or to a
   feature of the answer; what nothing in particular led to begins a chain itself. */

let effect = "direct"; /* or "through": shares in the end, which may be what is shown at first */
const isThrough = () => effect === "through";
const MOST_CHAINS = 3;
/* By words, a way is all chains that pass through them: none of the strongest ways is missed unless
   it is made of none of so many of the strongest chains. */
const CANDIDATES = 64;

const graphs = new Map();
function graph() {
  const told = data.total && data.total[prompt.name];
  if (!told) return null;
  if (!graphs.has(told)) {
    const rows = (held) => held.map(([columns, shares, features, others]) => ({ columns, shares, features, others }));
    const tokens = rows(told.tokens), nodes = told.features ? rows(told.features) : [];
    if (!told.features) data.output.forEach((piece, t) => { if (piece.feature !== null) nodes[piece.feature] = tokens[t]; });
    const errors = new Map();
    for (const { level, spans, se } of told.errors || []) spans.forEach(([from, to], i) => errors.set([level, from, to].join(), se[i]));
    graphs.set(told, { tokens, nodes, errors, strength: told.strength, tokenEnds: [], ends: [], best: [] });
  }
  return graphs.get(told);
}
const begins = (node) => !node.columns.length && !node.features.length;

/* What led to a row in the end: shares of the prompt's parts, and of features that chains begin with. */
function inTheEnd(own, row) {
  const found = { prompt: new Float64Array(prompt.names.length), output: new Float64Array(nOutput) };
  row.columns.forEach((j, k) => { found.prompt[j] += row.shares[k]; });
  row.features.forEach((j, k) => {
    const before = endOf(own, j);
    for (const side of ["prompt", "output"]) before[side].forEach((share, i) => { found[side][i] += row.others[k] * share; });
  });
  return found;
}
function endOf(own, feature) { /* causes come before: those of earlier features are known */
  for (let j = own.ends.length; j <= feature; j++) {
    own.ends[j] = inTheEnd(own, own.nodes[j]);
    if (begins(own.nodes[j])) own.ends[j].output[j] = 1;
  }
  return own.ends[feature];
}

/* Shares in tokens together, each with the weight of what led to it. */
function sharesOf(from, to) {
  const own = graph(), parts = answer.partOf || range(nOutput);
  const series = (width) => ({ value: new Float64Array(width), error: new Float64Array(width), count: 1, isShare: true });
  const found = { prompt: series(prompt.names.length), output: series(nOutput ? answer.names.length : 0) };
  const errors = own.errors.get([answer.name, from, to].join()), width = prompt.names.length;
  if (errors) {
    errors[0].forEach((column, k) => {
      const side = column < width ? found.prompt : found.output;
      side.error[column < width ? column : column - width] = known(errors[1][k]);
    });
  } else found.prompt.isUntold = found.output.isUntold = true; /* of a span that is no part of the answer */
  const all = total(own.strength, from, to);
  for (let t = from; t < to && all > 0; t++) {
    if (!(own.strength[t] > 0)) continue;
    const end = (own.tokenEnds[t] ||= inTheEnd(own, own.tokens[t])), weight = own.strength[t] / all;
    end.prompt.forEach((share, j) => { found.prompt.value[j] += weight * share; });
    end.output.forEach((share, j) => { found.output.value[parts[j]] += weight * share; });
  }
  return found;
}

/* Chains ------------------------------------------------------------------------------------------ */

/* The strongest chains to a row, each {share, column or null, features}: of features that are
   passed, or that it begins with. */
function strongest(own, row) {
  const found = row.columns.map((column, k) => ({ share: row.shares[k], column, features: [] }));
  row.features.forEach((j, k) => {
    for (const { share, column, features } of bestOf(own, j)) found.push({ share: share * row.others[k], column, features: [...features, j] });
  });
  return found.sort((a, b) => b.share - a.share).slice(0, CANDIDATES);
}
function bestOf(own, feature) {
  for (let j = own.best.length; j <= feature; j++) {
    own.best[j] = begins(own.nodes[j]) ? [{ share: 1, column: null, features: [] }] : strongest(own, own.nodes[j]);
  }
  return own.best[feature];
}

/* The share of all chains that go through these parts of the answer one after the other, whatever
   their features within: `way` has the column that they begin with, or null, and the parts. */
function shareAlong(own, view, way, partOf) {
  const place = new Map(way.parts.map((part, i) => [part, i])), last = way.parts.length;
  const at = (feature) => (place.has(partOf(feature)) ? place.get(partOf(feature)) : partOf(feature) === null ? last : -2);
  const mass = new Map();
  const into = (row, here) => {
    let sum = 0;
    if (here === 0 && way.column !== null) row.columns.forEach((j, k) => { if (j === way.column) sum += row.shares[k]; });
    row.features.forEach((j, k) => {
      const before = at(j);
      if (before === here || before === here - 1) sum += row.others[k] * (mass.get(j) || 0);
    });
    return sum;
  };
  own.nodes.forEach((node, j) => {
    const here = at(j);
    if (here >= 0) mass.set(j, begins(node) ? Number(here === 0 && way.column === null) : into(node, here));
  });
  const all = total(own.strength, view.from, view.to);
  let sum = 0;
  for (let t = view.from; t < view.to; t++) sum += (own.strength[t] / all) * into(own.tokens[t], last);
  return sum;
}

/* The strongest ways to what is selected, by parts of the answer as it is read. */
function waysTo(view) {
  const own = graph();
  if (!own || view.kind !== "rows" || isWhole(view)) return [];
  const inside = new Set(data.output.slice(view.from, view.to).map((piece) => piece.feature));
  for (const j of [...inside]) if (j !== null && data.output.some((piece, t) => piece.feature === j && (t < view.from || t >= view.to))) inside.delete(j);
  const partOf = (feature) => (inside.has(feature) ? null : answer.partOf ? answer.partOf[feature] : feature);
  const ways = new Map();
  for (let t = view.from; t < view.to; t++) {
    if (!(own.strength[t] > 0)) continue;
    for (const { column, features } of strongest(own, own.tokens[t])) {
      const parts = features.map(partOf).filter((part, i, all) => part !== null && part !== all[i - 1]);
      const key = [column, ...parts].join();
      if (!ways.has(key)) ways.set(key, { column, parts });
    }
  }
  return [...ways.values()].map((way) => ({ ...way, share: shareAlong(own, view, way, partOf) }))
    .sort((a, b) => b.share - a.share).slice(0, MOST_CHAINS);
}

const LONG_NAME = 24; /* characters beyond which a part of the prompt is told by its number */
function promptPart(column, most = 40) {
  const name = visible(prompt.names[column]);
  return name.length > LONG_NAME ? prompt.name + " " + (column + 1) + " " + quoted(name, most) : quoted(name);
}
/* ["paragraph 4 “Lake …”", "“is:”", "“1642”"] */
function stops(view, way) {
  const begin = way.column === null ? [] : [promptPart(way.column)];
  return [...begin, ...way.parts.map((part) => quoted(nameOf("answer", part), 24)), tokensText(view)];
}
function routeSaid(view) {
  const own = graph();
  if (!own || view.kind !== "rows" || isWhole(view)) return "";
  const [way] = waysTo(view);
  if (!way) return "Nothing in particular led to " + tokensText(view) + ".";
  const said = stops(view, way), share = percentOf(way.share) + " of what led to " + tokensText(view);
  if (way.column === null && !way.parts.length) return share + " begins with itself: nothing in particular led to its first token.";
  if (way.column === null) return share + " began with " + said[0] + ", which nothing in particular led to: " + said.join(" → ") + ".";
  if (!way.parts.length) return share + " came from " + said[0] + " directly, its strongest chain.";
  return share + " came along its strongest chain: " + said.join(" → ") + ".";
}

/* The strongest way as lines: from part to part. */
function chainLinks(view) {
  const [way] = waysTo(view);
  if (!way) return [];
  const pieceOf = (part) => { const owned = owners.answer[part]; return owned && owned[owned.length - 1].i; };
  const goal = pieces.answer.findIndex((piece) => piece.from < view.to && piece.to > view.from);
  const found = [];
  let side = way.column === null ? "answer" : "prompt", from = way.column;
  for (const part of way.parts) {
    if (from !== null) found.push({ side, column: from, piece: pieceOf(part), value: way.share });
    [side, from] = ["answer", part];
  }
  if (from !== null) found.push({ side, column: from, piece: goal, value: way.share });
  return found.filter((link) => link.piece !== undefined);
}
