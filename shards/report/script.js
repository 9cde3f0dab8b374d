"use strict";
const tip = document.getElementById("tip");
const show = (event) => {
  const text = event.target instanceof Element ? event.target.getAttribute("data-tip") : null;
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const right = window.innerWidth - tip.offsetWidth - 8;
  tip.style.left = Math.max(8, Math.min(event.clientX + 14, right)) + "px";
  tip.style.top = Math.max(8, event.clientY - tip.offsetHeight - 12) + "px";
};
document.addEventListener("pointermove", show);
document.addEventListener("pointerdown", show);  // a finger does not hover
// Clips play while they can be seen; who asked for less motion starts them by hand.
const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) target.pause();
    else if (still) target.preload = "auto";
    else target.play().catch(() => {});
  }
}, { rootMargin: "120px" });
const watch = (within) => within.querySelectorAll("video").forEach((video) => watcher.observe(video));
watch(document);
