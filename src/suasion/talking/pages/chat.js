// The page works without this script; with it replies appear as they are written, and can be stopped.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const form = $("say"), message = $("message"), send = $("send"), stop = $("stop");
  const notes = { length: "ended at the limit", stopped: "stopped" };
  const atEnd = () => innerHeight + scrollY >= document.documentElement.scrollHeight - 80;
  const follow = (was) => { if (was) scrollTo(0, document.documentElement.scrollHeight); };
  follow(true);

  const show = (articles, line) => {
    const article = articles[line.place], was = atEnd();
    article.querySelector(".text").textContent = line.text;
    article.querySelector(".note").textContent = line.finish ? notes[line.finish] ?? "" : "writes";
    for (const other of articles) other.classList.toggle("speaks", other === article && !line.finish);
    follow(was);
  };

  const read = async (body, articles) => {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", problem = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return problem;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((text) => JSON.parse(text))) {
        if (line.error) problem = line.error;
        else show(articles, line);
      }
    }
  };

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = message.value.trim();
    if (!text || send.disabled) return;
    const body = new URLSearchParams(new FormData(form));
    const round = $("round").content.firstElementChild.cloneNode(true);
    round.querySelector(".message").textContent = text;
    const articles = [...round.querySelectorAll("article")];
    $("hint")?.remove();
    $("setup").open = false;
    $("talk").append(round);
    $("problem").textContent = "";
    message.value = "";
    send.disabled = true;
    stop.hidden = false;
    follow(true);
    let problem = "";
    try {
      const answer = await fetch("/say", { method: "POST", body, headers: { accept: "application/x-ndjson" } });
      problem = answer.ok ? await read(answer.body, articles) : await answer.text();
    } catch {
      problem = "The connection broke off. Is the command still running?";
    }
    send.disabled = false;
    stop.hidden = true;
    for (const article of articles) {
      article.classList.remove("speaks");
      const note = article.querySelector(".note");
      if (note.textContent === "waits") note.textContent = "did not speak";
      if (note.textContent === "writes") note.textContent = "stopped";
    }
    if (problem) {
      $("problem").textContent = problem;
      if (articles.every((article) => !article.querySelector(".text").textContent)) {
        round.remove();
        message.value = text;
      }
    }
    message.focus();
  });

  stop.addEventListener("click", () => {
    fetch("/stop", { method: "POST", body: new URLSearchParams({ csrf: form.elements.csrf.value }), redirect: "manual" }).catch(() => {});
  });

  message.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
  });
})();
