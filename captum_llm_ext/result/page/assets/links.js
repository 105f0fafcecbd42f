/* Curves from the strongest causes to their effects, if both are visible. */

const sketch = at("links");

/* Visible lines of a piece, in the coordinates of the SVG. */
function inSight(piece, origin, frames) {
  const box = frames[piece.side];
  return Array.from(piece.ink.getClientRects())
    .filter((line) => line.top >= box.top - 1 && line.bottom <= box.bottom + 1 && line.width > 0)
    .map((line) => ({ x: (line.left + line.right) / 2 - origin.left, top: line.top - origin.top, bottom: line.bottom - origin.top }));
}

function curve(cause, effect) {
  const down = effect.top - cause.bottom;
  if (down > -4) { /* from line to line */
    const reach = Math.max(14, down / 2);
    return `M${cause.x} ${cause.bottom} C${cause.x} ${cause.bottom + reach} ${effect.x} ${effect.top - reach} ${effect.x} ${effect.top - 1}`;
  }
  const low = Math.max(cause.bottom, effect.bottom), dip = low + Math.min(26, 8 + Math.abs(effect.x - cause.x) / 7);
  return `M${cause.x} ${cause.bottom} C${cause.x} ${dip} ${effect.x} ${dip} ${effect.x} ${effect.bottom + 1}`;
}

let drawnLinks = [];
function drawLinks(links) {
  drawnLinks = links;
  const drawn = [];
  if (links.length && at("show-links").checked) {
    const origin = sketch.getBoundingClientRect();
    const frames = { prompt: at("prompt").getBoundingClientRect(), answer: at("answer").getBoundingClientRect() };
    const most = Math.max(...links.map((link) => Math.abs(link.value)));
    for (const { side, column, piece, value } of links) {
      const effect = inSight(pieces.answer[piece], origin, frames)[0];
      const cause = (owners[side][column] || []).flatMap((one) => inSight(one, origin, frames)).at(-1);
      if (!cause || !effect) continue;
      const path = document.createElementNS(sketch.namespaceURI, "path");
      path.setAttribute("d", curve(cause, effect));
      path.setAttribute("class", value > 0 ? "up" : "down");
      path.setAttribute("stroke-width", (1 + 3.5 * Math.abs(value) / most).toFixed(2));
      path.dataset.link = [side, column, piece].join(" ");
      drawn.push(path);
    }
  }
  sketch.replaceChildren(...drawn);
}
const redrawLinks = () => drawLinks(drawnLinks);
for (const side of ["prompt", "answer"]) at(side).addEventListener("scroll", redrawLinks, { passive: true });
