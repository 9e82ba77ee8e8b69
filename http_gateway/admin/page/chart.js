/* Small charts: a line over the last minutes, five at most, drawn with SVG. It says its value where the pointer is. */

import { make, svg } from "./dom.js";

const WIDTH = 240;
const HEIGHT = 56;
const LONGEST_MS = 5 * 60_000; // that a chart shows
const SHORTEST_MS = 40_000;
const GAP_MS = 8_000; // without a value, after which a line is interrupted: the page was not looked at

export class Chart {
  /* `format(value)`: a value for people; `most`: the value at the upper edge, where there is a fixed one. */
  constructor(title, format, most = null) {
    this.title = title;
    this.format = format;
    this.most = most;
    this.points = []; // [time in ms, value or null]
    this.value = make("span", { class: "card-value" }, "–");
    this.about = make("span", { class: "card-about" });
    this.area = svg("path", { class: "chart-area" });
    this.line = svg("path", { class: "chart-line" });
    this.mark = svg("circle", { class: "chart-mark", r: 3, cx: -10, cy: -10 });
    this.picture = svg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", preserveAspectRatio: "none", role: "img" },
      this.area,
      this.line,
    );
    this.overlay = svg("svg", { class: "chart-overlay", "aria-hidden": "true" }, this.mark);
    const frame = make("div", { class: "chart-frame" }, this.picture, this.overlay);
    frame.addEventListener("pointermove", (event) => this.#point(event, frame));
    frame.addEventListener("pointerleave", () => this.#leave());
    this.root = make(
      "section",
      { class: "card", "aria-label": title },
      make("h3", {}, title),
      make("p", { class: "card-line" }, this.value, this.about),
      frame,
    );
  }

  /* Add what is known at a time; null: nothing is. `about`: a few words beside the value. */
  add(time, value, about = "") {
    this.points.push([time, value]);
    while (this.points[0][0] < time - LONGEST_MS) this.points.shift();
    this.said = about;
    this.#leave();
    this.#draw(time);
  }

  get #top() {
    if (this.most !== null) return this.most;
    return Math.max(...this.points.map(([, value]) => value ?? 0), 1e-9) * 1.1;
  }

  #draw(now) {
    this.span = Math.max(now - this.points[0][0], SHORTEST_MS);
    const x = (time) => WIDTH - ((now - time) / this.span) * WIDTH;
    const y = (value) => HEIGHT - 2 - (Math.min(value, this.#top) / this.#top) * (HEIGHT - 6);
    const lines = this.#pieces().map((piece) =>
      piece.map(([time, value]) => `${x(time).toFixed(1)},${y(value).toFixed(1)}`),
    );
    this.line.setAttribute("d", lines.map((points) => `M${points.join("L")}`).join(""));
    const ends = this.#pieces().map((piece) => [x(piece[0][0]).toFixed(1), x(piece.at(-1)[0]).toFixed(1)]);
    this.area.setAttribute(
      "d",
      lines.map((points, at) => `M${ends[at][0]},${HEIGHT}L${points.join("L")}L${ends[at][1]},${HEIGHT}Z`).join(""),
    );
    const known = this.points.map(([, value]) => value).filter((value) => value !== null);
    const most = known.length ? this.format(Math.max(...known)) : "nothing";
    this.picture.setAttribute(
      "aria-label",
      `${this.title}: now ${this.value.textContent}; at most ${most} in the last five minutes`,
    );
    this.now = now;
  }

  /* The points without gaps between them. */
  #pieces() {
    const pieces = [];
    let last = -Infinity;
    for (const point of this.points) {
      if (point[1] === null) continue;
      if (point[0] - last > GAP_MS) pieces.push([]);
      pieces.at(-1).push(point);
      last = point[0];
    }
    return pieces;
  }

  #point(event, frame) {
    const box = frame.getBoundingClientRect();
    const time = this.now - (1 - (event.clientX - box.left) / box.width) * this.span;
    const known = this.points.filter(([, value]) => value !== null);
    if (!known.length) return;
    const [at, value] = known.reduce((best, point) =>
      Math.abs(point[0] - time) < Math.abs(best[0] - time) ? point : best,
    );
    this.mark.setAttribute("cx", (1 - (this.now - at) / this.span) * box.width);
    this.mark.setAttribute(
      "cy",
      ((HEIGHT - 2 - (Math.min(value, this.#top) / this.#top) * (HEIGHT - 6)) / HEIGHT) * box.height,
    );
    this.value.textContent = this.format(value);
    this.about.textContent = `${Math.round((this.now - at) / 1000)} s ago`;
  }

  #leave() {
    const value = this.points.at(-1)?.[1] ?? null;
    this.value.textContent = value === null ? "–" : this.format(value);
    this.about.textContent = this.said || "";
    this.mark.setAttribute("cx", -10);
  }
}
