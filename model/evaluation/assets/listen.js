"use strict";
// Order and file of the ratings: plain functions of their arguments, without the page.

function seedOf(text) {
  // FNV-1a over UTF-16 codes.
  let hash = 2166136261;
  for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), 16777619);
  return (hash >>> 0) || 1;
}

function dice(seed) {
  // xorshift32 (Marsaglia 2003); neighbouring seeds part after some rounds.
  let state = seed;
  const roll = (sides) => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return Math.floor(((state >>> 0) / 4294967296) * sides);
  };
  for (let i = 0; i < 16; i++) roll(2);
  return roll;
}

function orderFor(page, listener, items) {
  // Every item once, in an order of the listener's own; one clip twice in a row is avoided where that can be.
  const roll = dice(seedOf(page + "/" + listener.trim().toLowerCase()));
  const order = items.map((_, index) => index);
  for (let last = order.length - 1; last > 0; last--) {
    const other = roll(last + 1);
    [order[last], order[other]] = [order[other], order[last]];
  }
  const same = (a, b) => a >= 0 && b < order.length && items[order[a]].clip === items[order[b]].clip;
  const meets = (place) => same(place - 1, place) || same(place, place + 1);
  for (let place = 1; place < order.length; place++) {
    if (!same(place - 1, place)) continue;
    for (let other = 0; other < order.length; other++) {
      const swap = () => ([order[place], order[other]] = [order[other], order[place]]);
      swap();
      if (!meets(place) && !meets(other)) break;
      swap();
    }
  }
  return order;
}

function ratingsCsv(page, listener, items, answers, questions) {
  const cell = (value) => (/[",\n]/.test(value) ? '"' + String(value).replaceAll('"', '""') + '"' : String(value));
  const rows = [["page", "listener", "clip", "item", "question", "rating", "seconds"]];
  for (const item of items) {
    const answer = answers[item.item];
    for (const question of answer ? questions : []) {
      if (answer[question]) {
        rows.push([page, listener, item.clip, item.item, question, answer[question], answer.seconds.toFixed(1)]);
      }
    }
  }
  return rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

// The page.

function start() {
  const { page, items, questions } = JSON.parse(document.getElementById("data").textContent);
  const find = (name) => document.getElementById(name);
  const audio = find("sound");
  let listener = "", order = [], place = 0, answers = {}, heard = new Set(), shown = 0;

  const store = () => "f2v-listen/" + page + "/" + listener.toLowerCase();
  const show = (name) => {
    for (const part of ["welcome", "trial", "end"]) find(part).hidden = part !== name;
    find("save").hidden = name === "welcome";
  };
  const current = () => items[order[place]];
  const answered = (item) => questions.every((question) => (answers[item.item] || {})[question]);
  const done = () => items.filter(answered).length;

  function keep() {
    try {
      localStorage.setItem(store(), JSON.stringify(answers));
    } catch {
      find("notice").textContent = "This browser keeps no progress: do not close the page before you have saved.";
    }
  }

  function begin() {
    const name = find("name").value.trim();
    if (!/^[\p{L}\p{N}][\p{L}\p{N} ._-]{0,39}$/u.test(name)) {
      find("wrong").textContent = "Letters, digits, spaces, dots and dashes, please; 40 at most.";
      return;
    }
    listener = name;
    order = orderFor(page, listener, items);
    try {
      answers = JSON.parse(localStorage.getItem(store())) || {};
    } catch {
      answers = {};
    }
    keep();
    place = Math.max(0, order.findIndex((index) => !answered(items[index])));
    done() === items.length ? finish() : enter();
  }

  function clock() {
    // Time with the item on screen, kept when it is left or rated.
    const now = performance.now();
    const answer = (answers[current().item] ||= { seconds: 0 });
    answer.seconds += (now - shown) / 1000;
    shown = now;
  }

  function enter() {
    show("trial");
    shown = performance.now();
    find("notice").textContent = "";
    audio.src = current().sound;
    audio.play().catch(() => {});
    for (const input of document.querySelectorAll("fieldset input")) {
      input.checked = (answers[current().item] || {})[input.name] === Number(input.value);
    }
    draw();
  }

  function draw() {
    const open = heard.has(current().item) || answered(current());
    for (const set of document.querySelectorAll("fieldset")) set.disabled = !open;
    find("hint").textContent = open ? "" : "Listen to the end, then rate.";
    find("back").disabled = place === 0;
    find("next").disabled = !answered(current());
    find("count").textContent = `${place + 1} of ${items.length}`;
    find("bar").max = items.length;
    find("bar").value = done();
  }

  function rate(question, rating) {
    clock();
    answers[current().item][question] = rating;
    keep();
    draw();
  }

  function go(step) {
    if (step > 0 && !answered(current())) return;
    clock();
    keep();
    place += step;
    if (place >= order.length) place = Math.max(0, order.findIndex((index) => !answered(items[index])));
    done() === items.length && step > 0 && place === 0 ? finish() : enter();
  }

  function finish() {
    audio.pause();
    show("end");
    find("bar").value = find("bar").max = items.length;
    find("count").textContent = `${items.length} of ${items.length}`;
  }

  function save() {
    const text = ratingsCsv(page, listener, items, answers, questions);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = `ratings-${page}-${listener.replaceAll(" ", "_")}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  find("begin").onclick = begin;
  find("name").onkeydown = (event) => { if (event.key === "Enter") begin(); };
  find("back").onclick = () => go(-1);
  find("next").onclick = () => go(1);
  find("save").onclick = find("saveend").onclick = save;
  find("review").onclick = () => { place = 0; enter(); };
  audio.onended = () => { heard.add(current().item); draw(); };
  audio.onerror = () => { find("notice").textContent = "This sound cannot be played by this browser."; };
  for (const input of document.querySelectorAll("fieldset input")) {
    input.onchange = () => rate(input.name, Number(input.value));
  }
  document.onkeydown = (event) => {
    if (find("trial").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === " ") {
      audio.paused ? audio.play() : audio.pause();
    } else if (/^[1-5]$/.test(event.key)) {
      // The question that has the focus, else the first without an answer, else the first.
      const sets = [...document.querySelectorAll("fieldset")];
      const set = sets.find((one) => one.contains(document.activeElement))
        || sets.find((one) => !one.querySelector(":checked")) || sets[0];
      if (set.disabled) return;
      const input = set.querySelector(`[value="${event.key}"]`);
      input.checked = true;
      rate(input.name, Number(event.key));
      if (document.activeElement !== document.body) document.activeElement.blur();
    } else if (event.key === "Enter" && event.target.tagName !== "BUTTON") {
      go(1);
    } else if (event.key === "Backspace" && place > 0) {
      go(-1);
    } else {
      return;
    }
    event.preventDefault();
  };
}

if (typeof document !== "undefined") start();
