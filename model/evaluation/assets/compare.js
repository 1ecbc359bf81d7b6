"use strict";
// Tables: a press on a heading sorts by that column, a second press turns the order round.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").onclick = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((one) => one.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value;
      const sign = down ? -1 : 1;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const x = value(a), y = value(b);
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        return sign * (column ? x - y : x.localeCompare(y));
      });
      table.tBodies[0].append(...rows);
    };
  });
}

// Players: one at a time; a line in the picture shows the place, a press there moves it.
const players = [...document.querySelectorAll("audio")];
for (const audio of players) {
  const svg = audio.parentElement.querySelector("svg.picture");
  const now = svg.querySelector(".now");
  const { seconds, left, wide } = svg.dataset;
  const draw = () => {
    const x = Number(left) + Math.min(1, audio.currentTime / seconds) * wide;
    now.setAttribute("x1", x);
    now.setAttribute("x2", x);
    now.classList.add("on");
    if (!audio.paused) requestAnimationFrame(draw);
  };
  audio.onplay = () => {
    for (const other of players) if (other !== audio) other.pause();
    draw();
  };
  audio.onseeked = draw;
  audio.onended = () => now.classList.remove("on");
  svg.onclick = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    audio.currentTime = Math.max(0, Math.min(audio.duration || 0, ((x - left) / wide) * seconds));
    audio.play();
  };
}

// Keys: j and k go through the clips.
const clips = [...document.querySelectorAll("article")];
document.onkeydown = (event) => {
  if (!["j", "k"].includes(event.key) || event.ctrlKey || event.metaKey || event.altKey) return;
  const below = clips.findIndex((clip) => clip.getBoundingClientRect().top > (event.key === "j" ? 90 : 60));
  const here = below < 0 ? clips.length : below;
  const next = clips[event.key === "j" ? here : Math.max(0, here - 1 - (clips[here - 1]?.getBoundingClientRect().top > 40))];
  if (next) {
    next.scrollIntoView();
    next.focus({ preventScroll: true });
  }
};
