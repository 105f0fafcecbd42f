/* Heat map of the whole matrix: a row per part of the answer, a column per cause, a scale per block. */

const MAP = { row: 18, label: 150, head: 130, gap: 14, least: 3, most: 28, letters: 22, head_letters: 15 };
let mapPlaces = null; /* what was drawn where, for the pointer */

function mapBlocks() {
  const blocks = [];
  if (block !== "answer" || !nOutput) blocks.push({ side: "prompt", level: prompt, columns: range(prompt.names.length) });
  if (nOutput && block !== "prompt") blocks.push({ side: "answer", level: answer, columns: range(answer.names.length).filter((j) => answer.firstEnd[j] < Infinity) });
  return blocks;
}

function mapColours() {
  const style = getComputedStyle(root), colour = (name) => style.getPropertyValue(name).trim();
  return { up: colour("--up"), down: colour("--down"), size: colour("--size"), ink: colour("--ink"), muted: colour("--muted"), line: colour("--line"), accent: colour("--accent") };
}

function drawMap() {
  if (at("map").hidden) return;
  const canvas = at("map").firstElementChild, width = Math.max(at("map").clientWidth, 240);
  const blocks = mapBlocks(), colours = mapColours(), rows = answer.runs.length;
  const label = Math.min(MAP.label, width * 0.28);
  const count = blocks.reduce((n, one) => n + one.columns.length, 0) || 1;
  const cell = Math.max(MAP.least, Math.min(MAP.most, (width - label - MAP.gap * (blocks.length - 1) - 20) / count));
  const height = MAP.head + rows * MAP.row + 4, scale = window.devicePixelRatio || 1;
  canvas.width = width * scale;
  canvas.height = height * scale;
  canvas.style.height = height + "px";
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.font = "12px " + getComputedStyle(document.body).fontFamily;
  pen.textBaseline = "middle";
  const cells = answer.runs.map(([from, to]) => { const found = causesOf(from, to); return { prompt: found.prompt, answer: found.output }; });
  const absolute = isSized();
  let left = label;
  mapPlaces = { cell, blocks: [], rows };
  for (const one of blocks) {
    const series = cells.map((row) => row[one.side]);
    const most = series.reduce((most, row, p) => one.columns.reduce((m, j) => (answer.columns[p] === j && one.side === "answer" ? m : Math.max(m, Math.abs(row.value[j]) || 0)), most), 0);
    one.columns.forEach((j, k) => {
      const x = left + k * cell;
      if (cell >= 9 || one.columns.length * cell / 9 > k % Math.ceil(9 / cell) && k % Math.ceil(9 / cell) === 0) {
        pen.save();
        pen.translate(x + cell / 2, MAP.head - 6);
        pen.rotate(-Math.PI / 3);
        pen.fillStyle = colours.muted;
        pen.fillText(short(visible(one.level.names[j]), MAP.head_letters), 0, 0);
        pen.restore();
      }
      series.forEach((row, p) => {
        const y = MAP.head + p * MAP.row;
        if (one.side === "answer" && answer.firstEnd[j] >= answer.runs[p][1] - 1) { /* no cause: it comes later */
          pen.fillStyle = colours.line;
          pen.fillRect(x + cell / 2 - 1, y + MAP.row / 2 - 1, 2, 2);
          return;
        }
        if (isFaint(row, j) || !(most > 0)) return; /* blank: could be noise */
        const level = row.value[j] / most;
        if (!(Math.abs(level) > 0)) return;
        pen.fillStyle = "rgb(" + (absolute ? colours.size : level > 0 ? colours.up : colours.down) + " / " + Math.min(1, Math.abs(level)) + ")";
        pen.fillRect(x, y, Math.max(cell - (cell > 5 ? 1 : 0), 1), MAP.row - 1);
        if (!absolute && level < 0 && Math.abs(level) > 0.15 && cell > 6) { /* the sign is seen without colour */
          pen.strokeStyle = colours.ink;
          pen.beginPath();
          pen.moveTo(x + 2, y + MAP.row / 2);
          pen.lineTo(x + cell - 3, y + MAP.row / 2);
          pen.stroke();
        }
      });
    });
    pen.fillStyle = colours.muted;
    pen.fillText(one.side === "prompt" ? "in the prompt" : isThrough() ? "begins in the answer" : "in the answer so far", left, 8);
    pen.strokeStyle = colours.line;
    pen.strokeRect(left - 0.5, MAP.head - 0.5, one.columns.length * cell, rows * MAP.row);
    mapPlaces.blocks.push({ ...one, left, right: left + one.columns.length * cell });
    left += one.columns.length * cell + MAP.gap;
  }
  pen.textAlign = "end";
  answer.runs.forEach(([from, to], p) => {
    const isPinned = pinned && pinned.kind === "rows" && from >= pinned.from && to <= pinned.to && pinned.to - pinned.from < nTarget;
    pen.fillStyle = colours.ink;
    pen.font = (isPinned ? "bold " : "") + "12px " + getComputedStyle(document.body).fontFamily;
    pen.fillText(short(visible(nameOfRun(from, to)), MAP.letters), label - 6, MAP.head + p * MAP.row + MAP.row / 2);
  });
}

/* Row and column under the pointer, or null. */
function mapCell(event) {
  if (!mapPlaces) return null;
  const x = event.offsetX, p = Math.floor((event.offsetY - MAP.head) / MAP.row);
  if (p < 0 || p >= mapPlaces.rows) return null;
  const found = mapPlaces.blocks.find((one) => x >= one.left && x < one.right);
  return { p, side: found && found.side, column: found && found.columns[Math.floor((x - found.left) / mapPlaces.cell)] };
}
at("map").addEventListener("pointermove", (event) => {
  const cell = mapCell(event);
  if (!cell) return;
  const [from, to] = answer.runs[cell.p], view = viewOf({ kind: "rows", from, to });
  if (!cell.side) { at("details").textContent = describeRows(view); return; }
  const piece = owners[cell.side][cell.column] && owners[cell.side][cell.column][0];
  at("details").textContent = piece ? describe(view, piece) : describeRows(view);
});
at("map").addEventListener("click", (event) => {
  const cell = mapCell(event);
  if (!cell) return;
  toggle(pieces.answer[cell.p]);
  render();
});
