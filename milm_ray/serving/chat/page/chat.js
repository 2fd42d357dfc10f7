const $ = (id) => document.getElementById(id);
const root = location.pathname.replace(/\/*$/, "/");

// What must survive a reload lies in the browser; where it may not be used, in memory.
const memory = new Map();
const kept = {
  get(name) {
    try { return localStorage.getItem(`milm.${name}`) ?? memory.get(name) ?? null; }
    catch { return memory.get(name) ?? null; }
  },
  set(name, value) {
    memory.set(name, value);
    try { localStorage.setItem(`milm.${name}`, value); } catch { /* memory has it */ }
  },
  remove(name) {
    memory.delete(name);
    try { localStorage.removeItem(`milm.${name}`); } catch { /* was only in memory */ }
  },
};

function secret() {
  const bytes = crypto.getRandomValues(new Uint8Array(24));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function person() {
  if (!kept.get("person")) kept.set("person", secret());
  return kept.get("person");
}

const state = { language: kept.get("language") ?? "zh", setting: null, session: null, following: null };
const word = (name) => WORDS[state.language][name];
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const say = (text) => { if ($("status").textContent !== text) $("status").textContent = text; };

class Refused extends Error {
  constructor(status, code, wait) { super(code); Object.assign(this, { status, code, wait }); }
}

async function call(method, path, body) {
  const headers = { "X-Person": person() };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(root + path, { method, headers, body: body && JSON.stringify(body), cache: "no-store" });
  if (response.ok) return response;
  if (response.status === 401) { location.reload(); await new Promise(() => {}); }
  let code = "";
  try { code = (await response.json()).error.code ?? ""; } catch { /* an error of a proxy */ }
  throw new Refused(response.status, code, Number(response.headers.get("Retry-After")) || 0);
}

// Whether the same request may go well later: the server is busy, being replaced, or out of reach.
const passing = (error) => !(error instanceof Refused) || error.status === 429 || error.status >= 500
  || (error.status === 404 && error.code === "");

// shown: whether the page that waits for it is still there to say so.
async function patiently(action, shown = () => true) {
  for (let attempt = 0; ; attempt++) {
    try { return await action(); } catch (error) {
      if (!passing(error) || error.code === "too_many_sessions") throw error;
      if (shown()) say(error.code === "no_model" ? word("no_model") : word("again_soon"));
      await pause(Math.max(1000 * (error.wait ?? 0), Math.min(8000, 500 * 2 ** attempt)));
    }
  }
}

// language -----------------------------------------------------------------------------------------

function translate() {
  document.documentElement.lang = state.language;
  document.title = word("title");
  for (const node of document.querySelectorAll("[data-word]")) node.textContent = word(node.dataset.word);
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", word(node.dataset.label));
  $("language").textContent = word("other");
  $("language").lang = state.language === "zh" ? "en" : "zh";
  if (state.setting) { describeHelp(); describeChoices(); }
  if (state.session) { describeRole(); render(); }
}

function describeHelp() {
  $("help-lines").replaceChildren(...state.setting.help_lines.map((line) => {
    const item = document.createElement("li");
    item.append(phone(line.number), ` ${line[state.language]}${word("checked")(line.checked_on)}`);
    return item;
  }));
}

function phone(number) {
  const link = document.createElement("a");
  link.href = `tel:${number.replace(/[^0-9]/g, "")}`;
  link.textContent = number;
  return link;
}

// Text with the help lines' numbers as links that a phone can dial.
function dialable(text) {
  const numbers = state.setting.help_lines.map((line) => line.number);
  return text.split(/(\d[\d -]*\d)/).map((part) => (numbers.includes(part) ? phone(part) : part));
}

// start --------------------------------------------------------------------------------------------

function options(select, entries) {
  const chosen = select.value;
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
  if (entries.some(([value]) => value === chosen)) select.value = chosen;
}

function describeChoices() {
  const { setting, language } = state;
  for (const choice of document.querySelectorAll(".choice")) choice.hidden = setting.study;
  $("study-text").hidden = !setting.study;
  options($("model"), [["", word("blind")], ...setting.models.map((id) => [id, id])]);
  for (const [name, entries] of [["topic", setting.topics], ["motivation", setting.motivations]]) {
    options($(name), [["", word("assigned")], ...entries.map((entry) => [entry.id, entry[language].title])]);
  }
}

async function showStart() {
  state.session = null;
  kept.remove("session");
  kept.remove("outbox");
  show("start");
  $("start-title").focus();
  const mine = (await (await patiently(() => call("GET", "api/sessions"))).json()).sessions.length;
  say("");
  $("delete-all").hidden = mine === 0;
  $("delete-all").textContent = word("delete_all")(mine);
}

async function begin(event) {
  event.preventDefault();
  const button = event.submitter ?? $("start-form").querySelector("button");
  button.disabled = true;
  const wanted = (name) => (state.setting.study ? null : $(name).value || null);
  const body = {
    session_id: secret().slice(0, 32), participant: $("participant").value.trim(), language: state.language,
    model: wanted("model"), topic: wanted("topic"), motivation: wanted("motivation"),
  };
  try {
    state.session = await (await patiently(() => call("POST", "api/sessions", body))).json();
    kept.set("session", state.session.session_id);
    say("");
    showChat();
    $("text").focus();
  } catch (error) { complain(error); } finally { button.disabled = false; }
}

// chat ---------------------------------------------------------------------------------------------

function show(name) {
  for (const section of ["start", "chat", "after"]) $(section).hidden = section !== name;
}

function showChat() {
  show("chat");
  $("role").open = state.session.messages.length === 0;
  describeRole();
  $("log").replaceChildren();
  render();
}

function describeRole() {
  const { session, setting, language } = state;
  const topic = setting.topics.find((entry) => entry.id === session.topic)[language];
  const motivation = setting.motivations.find((entry) => entry.id === session.motivation)[language];
  $("role-topic").textContent = `${topic.title} — ${topic.card}`;
  $("role-motivation").textContent = `${motivation.title} — ${motivation.card}`;
  $("role-model").textContent = session.model ?? word("hidden");
}

// What was begun for one session may end when the person has long left it: it must not touch the next.
const current = (id) => state.session?.session_id === id;
const here = (id) => current(id) && !$("chat").hidden;
const last = () => state.session.messages.at(-1);
const waiting = () => last()?.role === "counselor" && last().status === "pending";

// Draw what has changed: a message that is drawn already is only added to, so that a screen reader
// reads each sentence once.
function render() {
  const log = $("log");
  const low = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  state.session.messages.forEach((message, index) => {
    const item = log.children[index] ?? log.appendChild(newItem());
    const preset = message.kind === "preset";
    item.className = `${message.role}${preset ? " preset" : ""}`;
    set(item.querySelector(".who"), message.role === "client" ? word("me") : word(preset ? "preset" : "ai"));
    const said = item.querySelector(".said");
    const anew = item.dataset.kind !== message.kind;
    item.dataset.kind = message.kind;
    // A safety text is read out at once, whatever else is being read.
    if (anew && preset) said.setAttribute("role", "alert");
    else if (anew) said.removeAttribute("role");
    if (anew || said.textContent !== message.content) {
      if (!preset && message.content.startsWith(said.textContent)) {
        const more = document.createElement("span");
        more.textContent = message.content.slice(said.textContent.length);
        said.append(more);
      } else said.replaceChildren(...(preset ? dialable(message.content) : [message.content]));
    }
    const pending = message.status === "pending";
    said.classList.toggle("waiting", pending && message.content === "");
    said.hidden = message.content === "" && !pending;
    const notice = item.querySelector(".notice");
    if (notice.textContent !== (message.notice ?? "")) notice.replaceChildren(...dialable(message.notice));
    notice.hidden = !message.notice;
    const note = item.querySelector(".note");
    set(note, ["stopped", "failed"].includes(message.status) ? word(message.status) : "");
    note.hidden = note.textContent === "";
  });
  while (log.children.length > state.session.messages.length) log.lastChild.remove();
  if (low) log.scrollTop = log.scrollHeight;
  const outbox = Boolean(kept.get("outbox"));
  $("send").disabled = waiting() || outbox;
  $("stop").hidden = !waiting() || outbox;
  $("retry").hidden = outbox || !["failed", "stopped"].includes(last()?.status);
}

function newItem() {
  const item = document.createElement("li");
  for (const [tag, name] of [["span", "who"], ["p", "said"], ["p", "notice"], ["p", "note"]]) {
    item.appendChild(document.createElement(tag)).className = name;
  }
  return item;
}

function set(node, text) { if (node.textContent !== text) node.textContent = text; }

async function send(event) {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || waiting() || kept.get("outbox")) return;
  const most = state.setting.max_message_chars;
  if (Array.from(text).length > most) { say(word("too_long")(most)); return; }
  // Kept before it is sent: whatever happens to this page, it is sent, and once.
  kept.set("outbox", JSON.stringify({ session: state.session.session_id, message_id: secret().slice(0, 32), content: text }));
  $("text").value = "";
  $("role").open = false;
  await deliver();
}

async function deliver() {
  const outbox = JSON.parse(kept.get("outbox") ?? "null");
  if (!outbox || outbox.session !== state.session.session_id) { kept.remove("outbox"); return; }
  const { session, message_id, content } = outbox;
  if (!state.session.messages.some((message) => message.message_id === message_id)) {
    state.session.messages.push({ message_id, role: "client", content, notice: "", kind: "client", status: "done" });
  }
  render();
  say(word("sending"));
  let failure = null;
  try {
    await patiently(() => call("POST", `api/sessions/${session}/messages`, { message_id, content }), () => here(session));
  } catch (error) { failure = error; }
  if (JSON.parse(kept.get("outbox") ?? "null")?.message_id === message_id) kept.remove("outbox");
  if (!here(session)) return;
  if (failure !== null) {
    $("text").value = content;
    if (failure.code === "busy") { await reload(); return; }
    state.session.messages = state.session.messages.filter((message) => message.message_id !== message_id);
    render();
    complain(failure);
    if (["ended", "limit"].includes(failure.code)) showAfter();
    return;
  }
  if (last().role === "client") {
    state.session.messages.push({ message_id, role: "counselor", content: "", notice: "", kind: "model", status: "pending" });
  }
  await follow(message_id);
}

// Read a reply to its end, however often the connection breaks.
async function follow(message_id) {
  const session = state.session;
  const id = session.session_id;
  const reply = session.messages.find((message) => message.message_id === message_id && message.role === "counselor");
  if (!reply || state.following === message_id) return;
  state.following = message_id;
  render();
  say(word("replying"));
  try {
    while (reply.status === "pending") {
      const response = await patiently(() => call("GET", `api/sessions/${id}/messages/${message_id}/reply`), () => here(id));
      try { await read(response, reply); } catch { /* broken off: asked for again */ }
      if (state.session !== session) return;
      if (reply.status === "pending") { say(word("again_soon")); await pause(700); }
    }
    say("");
    await reload();
  } catch (error) { if (here(id)) complain(error); } finally { if (state.following === message_id) state.following = null; }
  // The button that was pressed may be gone, and the focus with it.
  if (here(id)) { render(); if (document.activeElement === document.body) $("text").focus(); }
}

async function read(response, reply) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      const news = JSON.parse(event.slice(6));
      if (!state.session?.messages.includes(reply)) return reader.cancel();
      if (news.error) return;
      if (news.end) { reply.status = news.end; return; }
      reply.content = news.reset ? news.text : reply.content + news.text;
      reply.notice = news.notice;
      say(word("replying"));
      render();
    }
  }
}

// The server's view of the session is the true one.
async function reload() {
  const id = state.session.session_id;
  const fresh = await (await patiently(() => call("GET", `api/sessions/${id}`), () => here(id))).json();
  if (state.session?.session_id !== id) return;
  state.session = fresh;
  render();
}

async function stop() {
  const id = state.session.session_id;
  const path = `api/sessions/${id}/messages/${last().message_id}/stop`;
  $("stop").disabled = true;
  try { await patiently(() => call("POST", path), () => here(id)); }
  catch (error) { if (here(id)) complain(error); } finally { $("stop").disabled = false; }
}

async function retry() {
  const id = state.session.session_id;
  const { message_id } = last();
  try { await patiently(() => call("POST", `api/sessions/${id}/messages/${message_id}/retry`), () => here(id)); }
  catch (error) {
    if (here(id)) { complain(error); if (here(id)) await reload(); }
    return;
  }
  if (!here(id)) return;
  Object.assign(last(), { content: "", notice: "", kind: "model", status: "pending" });
  await follow(message_id);
}

async function end() {
  if (!(await sure(word("sure_end")))) return;
  const id = state.session.session_id;
  try {
    const ended = await (await patiently(() => call("POST", `api/sessions/${id}/end`), () => here(id))).json();
    if (!here(id)) return;
    state.session = ended;
    say("");
    showAfter();
  } catch (error) { if (here(id)) complain(error); }
}

// after --------------------------------------------------------------------------------------------

function showAfter() {
  show("after");
  $("rating").replaceChildren(...[1, 2, 3, 4, 5].map((value) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "rating", value, required: true });
    input.checked = state.session.rating === value;
    label.append(input, String(value));
    return label;
  }));
  $("comment").value = state.session.comment ?? "";
  $("after-title").focus();
}

async function rate(event) {
  event.preventDefault();
  const rated = { rating: Number(new FormData($("rating-form")).get("rating")), comment: $("comment").value };
  const id = state.session.session_id;
  try {
    await patiently(() => call("PUT", `api/sessions/${id}/rating`, rated), () => current(id));
    if (!current(id)) return;
    Object.assign(state.session, rated);
    say(word("rated"));
  } catch (error) { if (current(id)) complain(error); }
}

async function save() {
  try {
    const response = await patiently(() => call("GET", `api/sessions/${state.session.session_id}/export`));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await response.blob());
    link.download = `session-${state.session.session_id.slice(0, 8)}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say("");
  } catch (error) { complain(error); }
}

async function remove(path, question) {
  if (!(await sure(question))) return;
  const id = state.session?.session_id;
  try {
    await patiently(() => call("DELETE", path), () => current(id));
    if (!current(id)) return;
    await showStart();
    say(word("deleted"));
  } catch (error) { if (current(id)) complain(error); }
}

// the rest -----------------------------------------------------------------------------------------

function sure(question) {
  $("sure-text").textContent = question;
  $("sure").returnValue = "no";
  $("sure").showModal();
  $("sure-no").focus();
  return new Promise((done) => $("sure").addEventListener("close", () => done($("sure").returnValue === "yes"), { once: true }));
}

function complain(error) {
  if (error.code === "no_session") { say(word("gone")); showStart(); return; }
  say({ limit: word("limit"), no_model: word("no_model"), too_long: word("too_long")(state.setting?.max_message_chars) }[error.code] ?? word("wrong"));
}

async function open() {
  translate();
  state.setting = await (await patiently(() => call("GET", "api/setting"))).json();
  translate();
  const id = kept.get("session");
  if (!id) { await showStart(); return; }
  try {
    state.session = await (await patiently(() => call("GET", `api/sessions/${id}`))).json();
  } catch { await showStart(); say(word("gone")); return; }
  say("");
  if (state.session.end_reason) { showAfter(); return; }
  showChat();
  $("text").focus();
  if (kept.get("outbox")) await deliver();
  if (state.session && waiting()) await follow(last().message_id);
}

$("language").addEventListener("click", () => {
  state.language = state.language === "zh" ? "en" : "zh";
  kept.set("language", state.language);
  translate();
});
$("start-form").addEventListener("submit", begin);
$("composer").addEventListener("submit", send);
$("text").addEventListener("keydown", (event) => {
  // Enter also ends a word of an input method: it must not send half a sentence.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("stop").addEventListener("click", stop);
$("retry").addEventListener("click", retry);
$("end").addEventListener("click", end);
$("rating-form").addEventListener("submit", rate);
$("export").addEventListener("click", save);
$("again").addEventListener("click", showStart);
$("delete").addEventListener("click", () => remove(`api/sessions/${state.session.session_id}`, word("sure_delete")));
$("delete-all").addEventListener("click", () => remove("api/sessions", word("sure_delete_all")));
open().catch(() => say(word("wrong")));
