// The live form: asks for the state of the run, and takes in the parts of the page that have changed.
const LOOK = 5000;  // ms
let version = document.documentElement.getAttribute("data-version");
const shown = new Map([...document.querySelectorAll("[data-part]")].map((part) => [part, part.innerHTML]));
const opened = (part) => new Set([...part.querySelectorAll("details[open] > summary")].map((one) => one.textContent));
const take = (text) => {
  const fresh = new DOMParser().parseFromString(text, "text/html");
  const names = (page) => [...page.querySelectorAll("[data-part]")].map((part) => part.getAttribute("data-part")).join();
  if (names(fresh) !== names(document)) return location.reload();
  for (const part of document.querySelectorAll("[data-part]")) {
    const other = fresh.querySelector(`[data-part="${part.getAttribute("data-part")}"]`);
    if (other.innerHTML === shown.get(part)) continue;
    const open = opened(part);
    shown.set(part, other.innerHTML);
    part.replaceChildren(...other.childNodes);
    part.querySelectorAll("details > summary").forEach((one) => { if (open.has(one.textContent)) one.parentElement.open = true; });
    watch(part);
  }
  version = fresh.documentElement.getAttribute("data-version");
};
const look = async () => {
  const now = document.getElementById("now");
  try {
    const state = await (await fetch("state", { cache: "no-store" })).json();
    now.textContent = state.text;
    if (state.version !== version) take(await (await fetch("./", { cache: "no-store" })).text());
  } catch (error) {
    now.textContent = "The server has ended, or cannot be reached: this is what it showed last.";
  }
  setTimeout(look, LOOK);
};
look();
