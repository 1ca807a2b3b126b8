// The labelling page works without this script; with it there are keys, folding, active time and drafts.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const live = $("live");
  if (live) {
    // The dashboard: fetch the part that changes, unless somebody is reading it with the pointer or the keyboard inside.
    setInterval(async () => {
      if (document.hidden || live.contains(document.activeElement)) return;
      const answer = await fetch("/dashboard/live").catch(() => null);
      if (answer && answer.ok) live.innerHTML = await answer.text();
      $("offline").hidden = Boolean(answer && answer.ok);
    }, 5000);
  }
  const copy = $("copy");
  if (copy) copy.addEventListener("click", async () => {
    $("link").select();
    try { await navigator.clipboard.writeText($("link").value); copy.textContent = "Copied"; } catch { copy.textContent = "Press Ctrl+C"; }
  });

  if (!$("answer") && !$("undo")) return;
  document.documentElement.classList.add("script");
  const store = { // private windows may refuse storage
    get: (key) => { try { return localStorage.getItem(key); } catch { return null; } },
    set: (key, value) => { try { localStorage.setItem(key, value); } catch { /* drafts are a comfort, not a need */ } },
    remove: (key) => { try { localStorage.removeItem(key); } catch { /* as above */ } },
  };
  const withKeys = () => store.get("suasion-keys") !== "off";
  const undo = () => { const button = $("undo").querySelector("button"); if (!button.disabled) button.click(); };
  const plain = (event) => !(event.ctrlKey || event.metaKey || event.altKey || event.repeat);
  const form = $("answer");
  if (!form) { // everything is labelled: what is left to press is undo
    addEventListener("keydown", (event) => { if (plain(event) && withKeys() && event.key.toLowerCase() === "u") undo(); });
    return;
  }
  const status = $("status");
  const say = (text) => { status.textContent = text; };

  // Active time: the page is visible and something moved within the last minute.
  const idleAfter = 60, tick = 0.25;
  let seconds = 0, quiet = 0;
  for (const kind of ["keydown", "pointermove", "pointerdown", "wheel", "touchmove", "scroll"]) {
    addEventListener(kind, () => { quiet = 0; }, { passive: true, capture: true });
  }
  setInterval(() => { if (!document.hidden && (quiet += tick) < idleAfter) seconds += tick; }, tick * 1000);

  // Long texts are folded, both responses alike, and the question opens when they are unfolded.
  const folds = [...document.querySelectorAll("[data-fold]")];
  const em = parseFloat(getComputedStyle(document.body).fontSize);
  const long = (part) => part.scrollHeight > 44 * em;
  let folded = folds.some(long);
  const setFolded = (value) => {
    folded = value;
    const responses = folds.slice(1);
    folds.forEach((part, i) => part.classList.toggle("folded", value && (i ? responses.some(long) : long(part))));
    $("unfold").hidden = !value;
    form.classList.toggle("closed", value);
    for (const part of [$("choice"), $("clarity"), $("save")]) part.disabled = value;
  };
  setFolded(folded);
  $("unfold").querySelector("button").addEventListener("click", () => { setFolded(false); folds[1].focus({ preventScroll: true }); say("Everything is shown in full."); });

  const picked = (name) => form.querySelector(`input[name=${name}]:checked`);
  const draft = "suasion-draft-" + form.elements.task.value;
  let sent = false;
  const save = () => {
    if (sent || folded) return;
    if (!picked("choice") || !picked("clarity")) { say(picked("choice") ? "How clear was it? Press 1, 2 or 3." : "Choose A, B, tie or both bad first."); return; }
    form.requestSubmit($("save"));
  };
  form.addEventListener("submit", (event) => {
    if (sent) { event.preventDefault(); return; }
    if (event.submitter === $("save") && !(picked("choice") && picked("clarity"))) { event.preventDefault(); save(); return; }
    sent = true;
    form.elements.seconds.value = seconds.toFixed(2);
    store.remove(draft);
  });
  addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); }); // the back button must not answer twice

  // A click with a pointer saves as soon as both questions are answered; moving through the options with arrow keys never does.
  form.addEventListener("click", (event) => {
    if (event.target.matches("input[type=radio]") && event.detail > 0 && picked("choice") && picked("clarity")) save();
  });
  form.addEventListener("change", () => store.set(draft, [picked("choice")?.value ?? "", picked("clarity")?.value ?? ""].join(" ")));
  const [choice, clarity] = (store.get(draft) ?? " ").split(" ");
  for (const [name, value] of [["choice", choice], ["clarity", clarity]]) {
    const input = value && form.querySelector(`input[name=${name}][value="${CSS.escape(value)}"]`);
    if (input) input.checked = true;
  }

  $("skip").addEventListener("toggle", () => { if ($("skip").open) $("skip").scrollIntoView({ block: "nearest" }); }); // reasons may open below the window

  const letters = $("letters");
  letters.checked = withKeys();
  letters.addEventListener("change", () => store.set("suasion-keys", letters.checked ? "on" : "off"));
  const open = (id) => { if (!$(id).open) $(id).showModal(); };
  for (const part of document.querySelectorAll("[data-open]")) {
    part.addEventListener("click", (event) => { event.preventDefault(); open(part.dataset.open); });
  }

  addEventListener("keydown", (event) => {
    if (!plain(event) || document.querySelector("dialog[open]")) return;
    const skip = $("skip");
    if (event.key === "Escape" && skip.open) { skip.open = false; skip.querySelector("summary").focus(); return; }
    const inRadio = document.activeElement?.matches("input[type=radio]");
    if (event.key === "Enter" && inRadio) { event.preventDefault(); save(); return; }
    if (event.key === "Enter" && (document.activeElement === document.body || document.activeElement === $("top"))) { save(); return; }
    if (!letters.checked) return;
    const key = event.key.toLowerCase();
    if (key === "g") { open("guidelines"); return; }
    if (key === "?") { open("keys"); return; }
    if (key === "u") { undo(); return; }
    if (key === "r") { if (folded) $("unfold").querySelector("button").click(); return; }
    if (key === "s") { skip.open = true; skip.querySelector("button").focus(); return; }
    const reason = skip.open && skip.querySelector(`[aria-keyshortcuts="${CSS.escape(key)}"]:not(summary)`);
    if (reason) { reason.click(); return; } // while reasons are shown, numbers are theirs
    const input = form.querySelector(`input[data-key="${CSS.escape(key)}"]`);
    if (!input) return;
    if (folded) { say("Show everything in full first: press R."); return; }
    skip.open = false;
    input.checked = true;
    input.dispatchEvent(new Event("change", { bubbles: true }));
    if (picked("choice") && picked("clarity")) save();
    else say(input.name === "choice" ? "How clear was it? Press 1, 2 or 3." : "Now choose A, B, T or X.");
  });

  const did = { saved: "Saved.", skipped: "Skipped.", undone: "Taken back. Answer it again.", nothing: "Nothing to undo.", incomplete: "Not saved: answer both questions." };
  history.replaceState(null, "", "/task");
  $("top").focus({ preventScroll: true });
  const done = did[status.dataset.did];
  if (done) {
    setTimeout(() => { if (!status.textContent) say(done); }, 100); // a live region is read out when it changes after loading
    setTimeout(() => { if (status.textContent === done) say(""); }, 6000);
  }
})();
