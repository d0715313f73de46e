"use strict";
// The slices of one study: wheel, slider, keys, windows, heat maps. Data is JSON in the element "data", see report.viewer.
(() => {
  const at = id => document.getElementById(id);
  const data = JSON.parse(at("data").textContent), count = data.p.length;
  const state = {slice: data.start, window: data.windows[1], heat: true};
  const number = (value, digits) => value === null ? "–" : value.toFixed(digits).replace("-", "−");

  function show() {
    const i = state.slice, map = data.heat[i], p = data.p[i];
    at("slice").src = "data:image/jpeg;base64," + data.images[state.window][i];
    at("slice").alt = `slice ${i + 1} of ${count}, ${state.window} window`;
    at("heat").hidden = !(map && state.heat);
    if (map) at("heat").src = "data:image/png;base64," + map;
    at("place").textContent = `slice ${i + 1} of ${count}` + (data.mm[i] === null ? "" : `, ${number(data.mm[i], 1)} mm`);
    at("probability").textContent = p === null ? "not predicted" : `embolus ${number(p, 3)}`;
    at("problem").textContent = data.problems[i] || "";
    at("slider").value = i;
    for (const [name, value] of [["x1", i + .5], ["x2", i + .5]]) at("cursor").setAttribute(name, value);
    const y = count - i - .5;  // the head is at the top
    for (const name of ["y1", "y2"]) at("level").setAttribute(name, y);
    for (const button of document.querySelectorAll("[data-window]"))
      button.setAttribute("aria-pressed", button.dataset.window === state.window);
    for (const button of document.querySelectorAll("[data-slice]"))
      button.setAttribute("aria-pressed", Number(button.dataset.slice) === i);
    if (at("heat-switch")) at("heat-switch").checked = state.heat;
  }

  function go(slice) {
    state.slice = Math.min(Math.max(Math.round(slice), 0), count - 1);
    show();
  }

  function next(direction) {  // to the next marked slice
    const marks = direction > 0 ? data.marks : [...data.marks].reverse();
    const found = marks.find(mark => direction * (mark - state.slice) > 0);
    if (found !== undefined) go(found);
  }

  function choose(name) {
    state.window = name;
    show();
  }

  function toggle() {
    state.heat = !state.heat;
    show();
  }

  const keys = {
    ArrowUp: () => go(state.slice + 1), ArrowDown: () => go(state.slice - 1),
    ArrowRight: () => go(state.slice + 1), ArrowLeft: () => go(state.slice - 1),
    PageUp: () => go(state.slice + 10), PageDown: () => go(state.slice - 10),
    Home: () => go(0), End: () => go(count - 1), n: () => next(1), p: () => next(-1), h: toggle,
  };
  data.windows.forEach((name, i) => { keys[i + 1] = () => choose(name); });

  document.addEventListener("keydown", event => {
    const action = keys[event.key];
    if (!action || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    action();
  });

  let turned = 0;  // touchpads send many small turns
  at("view").addEventListener("wheel", event => {
    event.preventDefault();
    turned += event.deltaMode ? event.deltaY * 40 : event.deltaY;
    const steps = Math.trunc(turned / 40);
    turned -= 40 * steps;
    if (steps) go(state.slice - Math.sign(steps) * Math.min(Math.abs(steps), 3));
  }, {passive: false});

  function follow(element, place) {  // a press or a drag on a drawing goes to the slice there
    const move = event => {
      const box = element.getBoundingClientRect();
      go(place((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height));
    };
    element.addEventListener("pointerdown", event => { element.setPointerCapture(event.pointerId); move(event); });
    element.addEventListener("pointermove", event => { if (event.buttons) move(event); });
  }
  follow(at("profile"), x => x * count - .5);
  follow(at("coronal"), (x, y) => (1 - y) * count - .5);

  at("slider").addEventListener("input", event => go(Number(event.target.value)));
  for (const button of document.querySelectorAll("[data-window]")) button.addEventListener("click", () => choose(button.dataset.window));
  for (const button of document.querySelectorAll("[data-slice]")) button.addEventListener("click", () => go(Number(button.dataset.slice)));
  if (at("heat-switch")) at("heat-switch").addEventListener("change", toggle);
  show();
})();
