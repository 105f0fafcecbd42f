/* Total attribution: shares of the prompt, passed back through generated words. For each level of the
   prompt the data holds links, each the share of a direct cause of a token or of an answer feature;
   a feature without significant causes begins a chain itself. */

let effect = "direct"; /* or "through": total shares, which may be shown first */
const isThrough = () => effect === "through";
const MOST_CHAINS = 3;
/* A route is the set of all chains through the same words: a strong route is missed only if none of
   its chains is among so many of the strongest. */
const CANDIDATES = 64;

const graphs = new Map();
function graph() {
  const stored = data.total && data.total[prompt.name];
  if (!stored) return null;
  if (!graphs.has(stored)) {
    const rows = (entries) => entries.map(([columns, shares, features, others]) => ({ columns, shares, features, others }));
    const tokens = rows(stored.tokens), nodes = stored.features ? rows(stored.features) : [];
    if (!stored.features) data.output.forEach((piece, t) => { if (piece.feature !== null) nodes[piece.feature] = tokens[t]; });
    const errors = new Map();
    for (const { level, spans, se } of stored.errors || []) spans.forEach(([from, to], i) => errors.set([level, from, to].join(), se[i]));
    graphs.set(stored, { tokens, nodes, errors, strength: stored.strength, featureTotals: [], best: [] });
  }
  return graphs.get(stored);
}
const begins = (node) => !node.columns.length && !node.features.length;

/* Total shares of a row: of the prompt's parts, and of features that begin chains. */
function totalShares(own, row) {
  const found = { prompt: new Float64Array(prompt.names.length), output: new Float64Array(nOutput) };
  row.columns.forEach((j, k) => { found.prompt[j] += row.shares[k]; });
  row.features.forEach((j, k) => {
    const before = totalSharesOf(own, j);
    for (const side of ["prompt", "output"]) before[side].forEach((share, i) => { found[side][i] += row.others[k] * share; });
  });
  return found;
}
function totalSharesOf(own, feature) { /* causes precede their effects: totals of earlier features are known */
  for (let j = own.featureTotals.length; j <= feature; j++) {
    own.featureTotals[j] = totalShares(own, own.nodes[j]);
    if (begins(own.nodes[j])) own.featureTotals[j].output[j] = 1;
  }
  return own.featureTotals[feature];
}

/* The direct causes of several tokens as one node, and the strength of each token's in all of them.
   What words of the span did to one another is inside it. */
function spanCauses(own, from, to) {
  const inside = new Set(data.output.slice(from, to).map((piece) => piece.feature));
  data.output.forEach((piece, t) => { if (t < from || t >= to) inside.delete(piece.feature); });
  const rows = range(to - from).map((i) => {
    const { columns, shares, features, others } = own.tokens[from + i];
    const kept = range(features.length).filter((k) => !inside.has(features[k]));
    return { columns, shares, features: kept.map((k) => features[k]), others: kept.map((k) => others[k]), weight: own.strength[from + i] };
  });
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  const all = sum(rows.map((row) => (row.weight > 0 ? row.weight * (sum(row.shares) + sum(row.others)) : 0)));
  return all > 0 ? rows.filter((row) => row.weight > 0).map((row) => ({ ...row, weight: row.weight / all })) : [];
}

/* Total shares of several tokens as one node. */
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
  } else found.prompt.hasUnknownError = found.output.hasUnknownError = true; /* a span that is not a part of the answer at this level */
  for (const row of spanCauses(own, from, to)) {
    const end = totalShares(own, row);
    end.prompt.forEach((share, j) => { found.prompt.value[j] += row.weight * share; });
    end.output.forEach((share, j) => { found.output.value[parts[j]] += row.weight * share; });
  }
  return found;
}

/* Chains ------------------------------------------------------------------------------------------ */

/* The strongest chains to a row, each {share, column or null, features}; `features` are those passed,
   and the first one if the chain begins in the answer. */
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

/* The share of all chains through these parts of the answer in this order, by any of their features:
   `route` has the column that they begin with, or null, and the parts. */
function routeShare(own, rows, route, partOf) {
  const place = new Map(route.parts.map((part, i) => [part, i])), last = route.parts.length;
  const at = (feature) => (place.has(partOf(feature)) ? place.get(partOf(feature)) : -2);
  const mass = new Map();
  const into = (row, here) => {
    let sum = 0;
    if (here === 0 && route.column !== null) row.columns.forEach((j, k) => { if (j === route.column) sum += row.shares[k]; });
    row.features.forEach((j, k) => {
      const before = at(j);
      if (before === here || before === here - 1) sum += row.others[k] * (mass.get(j) || 0);
    });
    return sum;
  };
  own.nodes.forEach((node, j) => {
    const here = at(j);
    if (here >= 0) mass.set(j, begins(node) ? Number(here === 0 && route.column === null) : into(node, here));
  });
  return rows.reduce((sum, row) => sum + row.weight * into(row, last), 0);
}

/* The strongest routes to the selection, by parts of the answer at the current level. */
function routesTo(view) {
  const own = graph();
  if (!own || view.kind !== "rows" || isWhole(view)) return [];
  const partOf = (feature) => (answer.partOf ? answer.partOf[feature] : feature);
  const routes = new Map(), rows = spanCauses(own, view.from, view.to);
  for (const row of rows) {
    for (const { column, features } of strongest(own, row)) {
      const parts = features.map(partOf).filter((part, i, all) => part !== all[i - 1]);
      const key = [column, ...parts].join();
      if (!routes.has(key)) routes.set(key, { column, parts });
    }
  }
  return [...routes.values()].map((route) => ({ ...route, share: routeShare(own, rows, route, partOf) }))
    .sort((a, b) => b.share - a.share).slice(0, MOST_CHAINS);
}

const LONG_NAME = 24; /* characters above which a part of the prompt is named by its number */
function promptPart(column, most = 40) {
  const name = visible(prompt.names[column]);
  return name.length > LONG_NAME ? prompt.name + " " + (column + 1) + " " + quoted(name, most) : quoted(name);
}
/* ["paragraph 4 “Lake …”", "“is:”", "“1642”"] */
function stops(view, route) {
  const begin = route.column === null ? [] : [promptPart(route.column)];
  return [...begin, ...route.parts.map((part) => quoted(nameOf("answer", part), 24)), tokensText(view)];
}
function routeText(view) {
  const own = graph();
  if (!own || view.kind !== "rows" || isWhole(view)) return "";
  const [route] = routesTo(view);
  if (!route) return "Nothing in particular led to " + tokensText(view) + ".";
  const labels = stops(view, route), share = percentOf(route.share) + " of what led to " + tokensText(view);
  if (route.column === null && !route.parts.length) return share + " begins with itself: nothing in particular led to its first token.";
  if (route.column === null) return share + " began with " + labels[0] + ", which nothing in particular led to: " + labels.join(" → ") + ".";
  if (!route.parts.length) return share + " came from " + labels[0] + " directly, its strongest chain.";
  return share + " came along its strongest chain: " + labels.join(" → ") + ".";
}

/* The strongest route as links from part to part. */
function chainLinks(view) {
  const [route] = routesTo(view);
  if (!route) return [];
  const pieceOf = (part) => { const owned = owners.answer[part]; return owned && owned[owned.length - 1].i; };
  const goal = pieces.answer.findIndex((piece) => piece.from < view.to && piece.to > view.from);
  const found = [];
  let side = route.column === null ? "answer" : "prompt", from = route.column;
  for (const part of route.parts) {
    if (from !== null) found.push({ side, column: from, piece: pieceOf(part), value: route.share });
    [side, from] = ["answer", part];
  }
  if (from !== null) found.push({ side, column: from, piece: goal, value: route.share });
  return found.filter((link) => link.piece !== undefined);
}
