"use strict";
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
