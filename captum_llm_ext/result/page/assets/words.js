/* Words for numbers and for text. */

const at = (id) => document.getElementById(id);
const root = document.documentElement;

const decimals = (most) => (most > 0 ? Math.min(6, Math.max(most < 1000 ? 1 : 0, 2 - Math.floor(Math.log10(most)))) : 2);
function plain(x, most) {
  if (!Number.isFinite(x)) return "?";
  const text = Math.abs(x).toFixed(decimals(most));
  return (x < 0 && Number(text) !== 0 ? "−" : "") + text;
}
function signed(x, most) {
  const text = plain(x, most);
  return !isUnsigned && x > 0 && Number(text) !== 0 ? "+" + text : text;
}
function plusMinus(error, most) {
  if (!Number.isFinite(error)) return nUnknownErrors ? " ± ?" : "";
  if (!hasErrors || error === 0) return "";
  const text = plain(error, most);
  return Number(text) === 0 ? " ± <" + (10 ** -decimals(most)).toFixed(decimals(most)) : " ± " + text;
}
/* How many times as probable: for logarithmic values of single tokens. */
function factor(x, tokens) {
  if (unit !== "nats" || isUnsigned || !Number.isFinite(x) || !(Math.abs(x) >= 0.05) || tokens > 1) return "";
  const times = Math.exp(Math.min(Math.abs(x), 50));
  const shown = times >= 1e9 ? "over a billion" : Number(times.toPrecision(times < 10 ? 2 : 3)).toLocaleString("en");
  if (data.attr_target === "contrast") return x > 0 ? shown + " times the odds" : "the odds divided by " + shown;
  return shown + " times " + (x > 0 ? "as" : "less") + " probable";
}
/* A share in per cent. */
const hundredths = (x) => (x > 0 && Math.round(100 * x) === 0 ? "<1" : String(Math.round(100 * x)));
const percentOf = (share) => hundredths(share) + "\u00a0%";
/* The error between a share's number and its per cent sign. */
function spreadOf(series, i) {
  const error = series.error[i];
  if (series.hasUnknownError || !(series.value[i] > 0)) return "";
  return !Number.isFinite(error) ? " ± ?" : error > 0 ? " ± " + hundredths(error) : "";
}
const shareText = (series, i) => percentOf(series.value[i]).replace("\u00a0%", spreadOf(series, i) + "\u00a0%");
/* Whether colours show magnitudes without signs. */
const isSized = () => root.classList.contains("absolute") || root.classList.contains("shares");
const withUnit = (text) => (unit ? text + " " + unit : text);
function percent(logProb) {
  const share = 100 * Math.exp(logProb);
  if (!(share <= 101)) return "";
  return share < 0.01 ? "<0.01\u00a0%" : Number(share.toPrecision(2)) + "\u00a0%";
}
function odds(x) {
  const times = Number(Math.exp(Math.abs(x)).toPrecision(2));
  if (!(times < 1e9)) return "";
  return x < 0 ? "1 : " + times.toLocaleString("en") : times.toLocaleString("en") + " : 1";
}
/* Foils of a token; for a part of the answer, those of its first token. */
const MOST_FOILS = 5;
const foilsAt = (from) => (data.attr_target === "contrast" && data.foils ? data.foils[from] : []);
function ratherThan(view) {
  if (view.kind !== "rows" || view.piece < 0 || isWhole(view)) return "";
  const foils = foilsAt(view.from);
  return foils.length ? " rather than " + foils.slice(0, MOST_FOILS).map((foil) => quoted(foil, 24)).join(", ") + (foils.length > MOST_FOILS ? "…" : "") : "";
}
/* A value as a probability, or as the share of the token among token and foils. */
function share(x, view) {
  const n = view.to - view.from;
  if (data.attr_target === "log_prob" && n > 1) return percent(x / n) && percent(x / n) + " per token on average";
  if (data.attr_target === "log_prob") return percent(x);
  if (data.attr_target !== "contrast" || view.to - view.from > 1) return "";
  return foilsAt(view.from).length ? odds(x) : percent(x);
}

function visible(text) {
  const inner = text.trim();
  if (inner) return inner.replace(/\s+/g, " ");
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣") || "∅";
}
/* Cut at grapheme clusters, so that no emoji is halved; at a word boundary if that keeps half. */
function short(text, most = 48) {
  if (text.length <= most) return text;
  const letters = Intl.Segmenter ? Array.from(new Intl.Segmenter().segment(text.slice(0, 4 * most)), (part) => part.segment) : Array.from(text);
  if (letters.length <= most) return letters.join("");
  const kept = letters.slice(0, most - 1).join(""), behind = kept.slice(0, Math.max(kept.lastIndexOf(" "), 0));
  return (letters[most - 1].trim() && behind.length >= most / 2 ? behind : kept).trimEnd() + "…";
}
/* Right-to-left text is isolated, so that it does not reorder the words around it. */
const runsLeft = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff]/;
function quoted(text, most) {
  const shown = short(visible(text), most);
  return runsLeft.test(shown) ? "“\u2068" + shown + "\u2069”" : "“" + shown + "”";
}
/* Direction of a text: that of its first letter. */
const directionOf = (text) => (runsLeft.test((text.match(/\p{L}/u) || [""])[0]) ? "rtl" : "ltr");
const textOf = (from, to) => data.output.slice(from, to).map((piece) => piece.text).join("");
/* A token of a partial character has no text, but a name. */
const nameOfRun = (from, to) => textOf(from, to) || data.output_tokens[from] || "";
const tokensText = (view) => (isWhole(view) ? "Whole answer" : quoted(nameOfRun(view.from, view.to)));

function make(tag, className, text) {
  const el = document.createElement(tag);
  if (className) el.className = className;
  if (text !== undefined) el.textContent = text;
  return el;
}
