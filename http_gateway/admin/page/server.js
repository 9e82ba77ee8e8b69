/* The server's page: its load and its processes as they are now, asked for every two seconds while somebody looks. */

import { condition, json, mayAskAgain, text, unreadiness } from "./api.js";
import { Chart } from "./chart.js";
import { byId, make } from "./dom.js";

const PERIOD_MS = 2000;
const MOST_EVENTS = 50;
const ROLES = ["gateway", "tokenizer", "scheduler", "detokenizer"];
const ABOUT_ROLES = {
  gateway: "speaks HTTP",
  tokenizer: "text into tokens",
  scheduler: "runs the model",
  detokenizer: "tokens into text",
};

const whole = (value) => Math.round(value).toLocaleString("en");
const percent = (value) => `${(value * 100).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`;
const rate = (value) => (value > 0 && value < 100 ? value.toFixed(1) : whole(value));
const megabytes = (value) => `${whole(value / 2 ** 20)} MB`;
const seconds = (value) => (value < 1 ? `${(value * 1000).toFixed(0)} ms` : `${value.toFixed(2)} s`);

export class ServerView {
  constructor() {
    this.root = byId("server");
    this.charts = {
      running: new Chart("Running requests", whole),
      queue: new Chart("Waiting in the queue", whole),
      output: new Chart("Output tokens per second", rate),
      input: new Chart("Prompt tokens per second", rate),
      kv: new Chart("KV cache in use", percent, 1),
      hits: new Chart("Prompt tokens from the cache", percent, 1),
      first: new Chart("Time to first token", seconds),
      between: new Chart("Time between tokens", seconds),
    };
    this.problem = make("p", { class: "problem", role: "status", hidden: true });
    this.facts = make("dl", { class: "facts" });
    this.processes = make("tbody");
    this.events = make(
      "ol",
      { class: "events" },
      make("li", { class: "none" }, "Nothing has happened since you opened this page."),
    );
    this.before = null; // the last sample
    this.#build();
    document.addEventListener("visibilitychange", () => this.#schedule(0));
  }

  #build() {
    const head = make(
      "tr",
      {},
      ...["Process", "State", "CPU", "Memory", "Restarts"].map((name) => make("th", { scope: "col" }, name)),
    );
    const table = make("table", { class: "processes" }, make("thead", {}, head), this.processes);
    this.root.append(
      make(
        "div",
        { class: "server-inner" },
        make("h2", {}, "Load"),
        this.problem,
        make("div", { class: "cards" }, ...Object.values(this.charts).map((chart) => chart.root)),
        make(
          "div",
          { class: "columns" },
          panel("Processes", make("div", { class: "processes-frame" }, table)),
          panel("Model and server", this.facts),
          panel("Events", this.events),
        ),
      ),
    );
  }

  /* Begin to ask, or end. */
  show(visible) {
    this.root.hidden = !visible;
    if (visible) mayAskAgain();
    this.#schedule(0);
  }

  #schedule(wait) {
    clearTimeout(this.timer);
    if (!this.root.hidden && !document.hidden) this.timer = setTimeout(() => this.#poll(), wait);
  }

  async #poll() {
    if (this.polling) return;
    this.polling = true;
    try {
      this.#take(await sample());
      this.problem.hidden = true;
    } catch (error) {
      this.problem.textContent = error.message;
      this.problem.hidden = false;
      document.dispatchEvent(new CustomEvent("quartet:status", { detail: { ok: false, text: error.message } }));
    } finally {
      this.polling = false;
      this.#schedule(PERIOD_MS);
    }
  }

  #take(now) {
    const { charts, before } = this;
    const { scheduler, time } = now;
    const known = scheduler !== null;
    charts.running.add(time, known ? scheduler.num_running_reqs : null, `of ${now.info.max_running_requests} at once`);
    charts.queue.add(time, known ? scheduler.num_queue_reqs : null);
    charts.kv.add(
      time,
      known ? scheduler.token_usage : null,
      known ? `${whole(scheduler.num_used_tokens)} of ${whole(scheduler.max_total_num_tokens)} tokens` : "",
    );
    const over = before && known && before.scheduler ? (time - before.time) / 1000 : 0;
    const grown = (name) => (over ? scheduler[name] - before.scheduler[name] : -1);
    const perSecond = (name) => (grown(name) >= 0 ? grown(name) / over : null); // a new scheduler counts from 0
    charts.output.add(
      time,
      perSecond("generation_tokens_total"),
      known ? `${whole(scheduler.generation_tokens_total)} in all` : "",
    );
    charts.input.add(
      time,
      perSecond("prompt_tokens_total"),
      known ? `${whole(scheduler.prompt_tokens_total)} in all` : "",
    );
    const share =
      known && scheduler.prompt_tokens_total ? scheduler.cached_tokens_total / scheduler.prompt_tokens_total : null;
    const prompts = grown("prompt_tokens_total");
    charts.hits.add(
      time,
      prompts > 0 ? grown("cached_tokens_total") / prompts : null,
      share === null ? "" : `${percent(share)} in all`,
    );
    charts.first.add(
      time,
      meanSince(before, now, "sglang:time_to_first_token_seconds"),
      aboutMean(now, "sglang:time_to_first_token_seconds"),
    );
    charts.between.add(
      time,
      meanSince(before, now, "sglang:inter_token_latency_seconds"),
      aboutMean(now, "sglang:inter_token_latency_seconds"),
    );
    this.#showProcesses(before, now);
    this.#showFacts(now);
    this.#noteEvents(before, now);
    this.before = now;
    document.dispatchEvent(
      new CustomEvent("quartet:status", {
        detail: { ok: !now.reason, text: now.reason || (now.sleeping ? `${now.name} · sleeping` : now.name) },
      }),
    );
  }

  /* CPU time is shown as a share of one core since the last look. */
  #showProcesses(before, now) {
    const number = (value, format) => make("td", { class: "count" }, value === undefined ? "–" : format(value));
    const shares = before ? sharesOfCore(before, now) : {};
    const rows = ROLES.map((role) =>
      make(
        "tr",
        { "data-role": role },
        make("th", { scope: "row" }, role, make("small", {}, ABOUT_ROLES[role])),
        stateOf(role, now.reason),
        number(shares[role], percent),
        number(now.memory[role], megabytes),
        number(now.restarts[role], whole),
      ),
    );
    this.processes.replaceChildren(...rows);
  }

  #showFacts({ info, name, reason, sleeping }) {
    const facts = {
      State: reason || (sleeping ? "sleeping until somebody asks" : "ready"),
      Model: name,
      Path: info.model_path === name ? "" : info.model_path,
      "Weight version": info.weight_version,
      Context: `${whole(info.max_model_len)} tokens`,
      "KV cache": `${whole(info.max_total_num_tokens)} tokens`,
      Arithmetic: [info.dtype, info.quantization].filter((value) => value && value !== "auto").join(", "),
      Device: info.device,
      "Gateway up for": duration(info.uptime_s),
      Version: info.version,
    };
    const rows = Object.entries(facts).filter(([, value]) => value !== undefined && value !== "");
    this.facts.replaceChildren(
      ...rows.flatMap(([title, value]) => [make("dt", {}, title), make("dd", {}, String(value))]),
    );
  }

  #noteEvents(before, now) {
    if (!before) return;
    const said = [];
    if (before.info.weight_version !== now.info.weight_version)
      said.push(`The weights are now version ${now.info.weight_version}.`);
    for (const role of ROLES) {
      if (now.restarts[role] > before.restarts[role]) said.push(`The ${role} was started again.`);
    }
    if (now.sleeping !== before.sleeping) said.push(now.sleeping ? "The server sleeps." : "The server is awake.");
    if (now.reason && now.reason !== before.reason) said.push(`${now.reason[0].toUpperCase()}${now.reason.slice(1)}.`);
    if (!said.length) return;
    this.events.querySelector(".none")?.remove();
    const at = new Date(now.time).toLocaleTimeString();
    this.events.prepend(...said.map((text) => make("li", {}, make("time", {}, at), text)));
    while (this.events.childElementCount > MOST_EVENTS) this.events.lastElementChild.remove();
  }
}

function panel(title, content) {
  return make("section", { class: "panel" }, make("h2", {}, title), content);
}

/* Everything that is known now; what the server does not tell is null. */
async function sample() {
  const asked = [json("server_info"), metricsOf(), unreadiness(), condition("health")];
  const [info, metrics, reason, health] = await Promise.all(asked);
  return {
    time: Date.now(),
    info,
    name: info.served_model_name || info.model_path,
    scheduler: info.internal_states[0] || null,
    metrics,
    restarts: byRole(metrics, "quartet:restarts_total"),
    cpu: byRole(metrics, "quartet:process_cpu_seconds_total"),
    memory: byRole(metrics, "quartet:process_resident_memory_bytes"),
    reason,
    sleeping: health.status === "sleeping",
  };
}

async function metricsOf() {
  try {
    return parsedMetrics(await text("metrics"));
  } catch (error) {
    if (error.status === 404) return null; // the operator has switched them off
    throw error;
  }
}

/* Name → list of {labels, value}, from Prometheus' text. */
export function parsedMetrics(exposition) {
  const found = new Map();
  for (const line of exposition.split("\n")) {
    const parts = /^([\w:]+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!parts) continue;
    if (!found.has(parts[1])) found.set(parts[1], []);
    found.get(parts[1]).push({ labels: parts[2] || "", value: Number(parts[3]) });
  }
  return found;
}

function stateOf(role, reason) {
  const well = !reason.includes(role);
  const said = well ? "running" : reason.includes("again") ? "starting again" : "not well";
  return make("td", {}, make("span", { class: `dot ${well ? "ok" : "bad"}`, "aria-hidden": "true" }), said);
}

/* Role → share of a core that its process has used between two samples. A new process counts from 0. */
function sharesOfCore(before, now) {
  const found = {};
  for (const [role, spent] of Object.entries(now.cpu)) {
    const used = spent - before.cpu[role];
    if (used >= 0) found[role] = (used * 1000) / (now.time - before.time);
  }
  return found;
}

/* Role → value of a metric that each process has. */
function byRole(metrics, name) {
  const found = {};
  for (const { labels, value } of metrics?.get(name) || []) found[/role="(\w+)"/.exec(labels)?.[1]] = value;
  return found;
}

function total(sampled, name) {
  return (sampled?.metrics?.get(name) || []).reduce((sum, { value }) => sum + value, 0);
}

/* The mean of a histogram's values between two samples; null where there were none. */
function meanSince(before, now, name) {
  if (!before) return null;
  const count = total(now, `${name}_count`) - total(before, `${name}_count`);
  return count > 0 ? (total(now, `${name}_sum`) - total(before, `${name}_sum`)) / count : null;
}

function aboutMean(now, name) {
  const count = total(now, `${name}_count`);
  return count ? `${seconds(total(now, `${name}_sum`) / count)} on average` : "";
}

function duration(total) {
  const minutes = Math.floor(total / 60);
  if (minutes < 1) return `${Math.round(total)} s`;
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} days`;
}
