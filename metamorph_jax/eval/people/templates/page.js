"use strict";
// Reads the study in #data, shows an item at a time, and keeps answers in this browser's storage.
(() => {
  const study = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const choices = [["left", "Left"], ["tie", "Equally good"], ["right", "Right"]];
  let state = null; // {rater, answers: {item: {question: side}}, seconds: {item: n}, place}
  let since = 0;

  const keyOf = (rater) => `pairs ${study.study} ${rater}`;

  function load(rater) {
    const fresh = { rater, answers: {}, seconds: {}, place: 0 };
    try {
      const text = localStorage.getItem(keyOf(rater));
      localStorage.setItem(keyOf(rater), text || JSON.stringify(fresh));
      return text ? { ...fresh, ...JSON.parse(text) } : fresh;
    } catch (error) {
      warn("This browser keeps nothing for this page: please don't close it before you have downloaded your answers.");
      return fresh;
    }
  }

  function save() {
    try {
      localStorage.setItem(keyOf(state.rater), JSON.stringify(state));
    } catch (error) { /* said before */ }
  }

  function warn(text) {
    at("warning").textContent = text;
    at("warning").hidden = false;
  }

  const answersOf = (item) => state.answers[item.id] || {};
  const isDone = (item) => item.asked.every((key) => answersOf(item)[key]);
  const done = () => study.items.filter(isDone).length;

  // ---- documents

  function part(one) {
    if (one.image) {
      const image = document.createElement("img");
      image.src = study.images[one.image];
      image.alt = "image";
      return image;
    }
    const text = document.createElement("p");
    text.textContent = one.text;
    return text;
  }

  function fill(place, parts) {
    place.replaceChildren(...parts.map(part));
    if (!parts.length) {
      const empty = part({ text: "(nothing)" });
      empty.className = "empty";
      place.append(empty);
    }
  }

  // Texts with the image that follows them, side by side.
  function fillGiven(parts) {
    const cells = [];
    for (const one of parts) {
      const last = cells[cells.length - 1];
      if (one.image && last && !last.querySelector("img")) {
        last.append(part(one));
        last.className = "";
        continue;
      }
      const cell = document.createElement("div");
      cell.className = one.image ? "" : "wide";
      cell.append(part(one));
      cells.push(cell);
    }
    at("given").replaceChildren(...cells);
  }

  // ---- questions

  function question(item, asked) {
    const field = document.createElement("fieldset");
    const legend = document.createElement("legend");
    legend.textContent = asked.text;
    const row = document.createElement("div");
    row.className = "choices";
    for (const [value, name] of choices) {
      const label = document.createElement("label");
      const input = document.createElement("input");
      input.type = "radio";
      input.name = asked.key;
      input.value = value;
      input.checked = answersOf(item)[asked.key] === value;
      input.addEventListener("change", () => {
        state.answers[item.id] = { ...answersOf(item), [asked.key]: value };
        save();
        head();
      });
      label.append(input, name);
      row.append(label);
    }
    field.append(legend, row);
    return field;
  }

  // ---- pages

  function head() {
    const item = study.items[state.place];
    const where = item ? `Pair ${state.place + 1} of ${study.items.length}, ${done()} answered` : "";
    at("where").textContent = where;
    at("bar").firstElementChild.style.width = `${(100 * done()) / study.items.length}%`;
    at("next").className = item && isDone(item) ? "main" : "";
    at("next").textContent = item && isDone(item) ? "Next" : "Skip";
    at("back").disabled = state.place === 0;
  }

  function clock() {
    const item = study.items[state.place];
    if (item && since) {
      const seconds = (Date.now() - since) / 1000;
      state.seconds[item.id] = Math.round(10 * ((state.seconds[item.id] || 0) + seconds)) / 10;
    }
    since = Date.now();
  }

  function show() {
    const item = study.items[state.place];
    at("start").hidden = true;
    at("pair").hidden = !item;
    at("end").hidden = Boolean(item);
    document.querySelector("footer").hidden = false;
    head();
    if (!item) {
      const left = study.items.length - done();
      at("left-out").textContent = left ? `${left} of ${study.items.length} pairs are not answered completely.` : "All pairs are answered.";
      at("download").className = "main";
      return;
    }
    at("download").className = "";
    fillGiven(item.given);
    fill(at("left"), item.left);
    fill(at("right"), item.right);
    const asked = study.questions.filter((one) => item.asked.includes(one.key));
    at("questions").replaceChildren(...asked.map((one) => question(item, one)));
    window.scrollTo(0, 0);
  }

  function go(place) {
    clock();
    state.place = Math.max(0, Math.min(study.items.length, place));
    save();
    show();
  }

  function download() {
    clock();
    save();
    const { rater, answers, seconds } = state;
    const out = { format: study.format, study: study.study, rater, answers, seconds };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(out, null, 1)], { type: "application/json" }));
    link.download = `answers-${study.study}-${rater.replace(/[^\p{L}\p{N}]+/gu, "_")}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  at("start").addEventListener("submit", (event) => {
    event.preventDefault();
    const rater = at("rater").value.trim();
    if (!rater) return;
    state = load(rater);
    since = Date.now();
    show();
  });
  at("questions").addEventListener("submit", (event) => event.preventDefault());
  at("next").addEventListener("click", () => go(state.place + 1));
  at("back").addEventListener("click", () => go(state.place - 1));
  at("again").addEventListener("click", () => {
    const open = study.items.findIndex((item) => !isDone(item));
    go(open < 0 ? 0 : open);
  });
  at("download").addEventListener("click", download);
})();
