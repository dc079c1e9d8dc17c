// The nearest-patch explorer: click a patch, see its cosine similarity to all patches of all images.
"use strict";
(() => {
  const source = document.getElementById("patch-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const [rows, columns] = data.grid;
  const numPatches = rows * columns;
  const numImages = data.names.length;
  const frames = [...document.querySelectorAll(".frame")];
  const list = document.querySelector(".nearest ol");
  const otherImages = document.getElementById("other-images");
  const heat = document.getElementById("heat");
  const tip = document.querySelector(".tip");
  const LISTED = 8;

  for (const encoder of data.encoders) {
    encoder.vectors = new Int8Array(Uint8Array.from(atob(encoder.codes), (c) => c.charCodeAt(0)).buffer);
    encoder.norms = new Float32Array(numImages * numPatches);
    for (let i = 0; i < encoder.norms.length; i++) encoder.norms[i] = Math.sqrt(dot(encoder, i, i)) || 1;
  }

  let encoder = data.encoders[0];
  let selected = data.start[0] * numPatches + data.start[1];
  let sims = new Float32Array(0);

  function dot(of, a, b) {
    let sum = 0;
    for (let k = 0, i = a * of.dims, j = b * of.dims; k < of.dims; k++) sum += of.vectors[i + k] * of.vectors[j + k];
    return sum;
  }

  // Similarity 0..1 as dark violet over orange to pale yellow; below 0 as 0.
  const STOPS = [[10, 8, 32], [88, 20, 110], [187, 55, 84], [249, 142, 9], [252, 245, 170]];
  function colour(sim) {
    const place = Math.min(Math.max(sim, 0), 1) * (STOPS.length - 1);
    const left = Math.min(Math.floor(place), STOPS.length - 2);
    return STOPS[left].map((value, c) => value + (STOPS[left + 1][c] - value) * (place - left));
  }

  function box(frame, patch, kind) {
    const element = document.createElement("div");
    element.className = "box " + kind;
    element.style.left = ((patch % columns) / columns) * 100 + "%";
    element.style.top = (Math.floor(patch / columns) / rows) * 100 + "%";
    element.style.width = 100 / columns + "%";
    element.style.height = 100 / rows + "%";
    frame.append(element);
  }

  function nearest() {
    const image = Math.floor(selected / numPatches);
    const skips = (i) => i === selected || (otherImages.checked && Math.floor(i / numPatches) === image);
    const order = [...sims.keys()].filter((i) => !skips(i));
    return order.sort((a, b) => sims[b] - sims[a] || a - b).slice(0, LISTED);
  }

  // The patch with its surroundings, cut from the picture that is on the page.
  function cutOut(index) {
    const picture = frames[Math.floor(index / numPatches)].querySelector("img");
    const patch = index % numPatches;
    const [w, h] = [picture.naturalWidth / columns, picture.naturalHeight / rows];
    const [x, y] = [(patch % columns) * w, Math.floor(patch / columns) * h];
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 120;
    const context = canvas.getContext("2d");
    const span = Math.min(4 * Math.max(w, h), picture.naturalWidth, picture.naturalHeight);
    const left = Math.min(Math.max(x + w / 2 - span / 2, 0), picture.naturalWidth - span);
    const top = Math.min(Math.max(y + h / 2 - span / 2, 0), picture.naturalHeight - span);
    context.drawImage(picture, left, top, span, span, 0, 0, 120, 120);
    const scale = 120 / span;
    for (const [style, width] of [["#000", 4], ["#7ff0ff", 2]]) {
      context.strokeStyle = style;
      context.lineWidth = width;
      context.strokeRect((x - left) * scale, (y - top) * scale, w * scale, h * scale);
    }
    return canvas;
  }

  function draw() {
    sims = new Float32Array(numImages * numPatches);
    for (let i = 0; i < sims.length; i++) {
      sims[i] = dot(encoder, selected, i) / (encoder.norms[selected] * encoder.norms[i]);
    }
    const found = nearest();
    frames.forEach((frame, image) => {
      const canvas = frame.querySelector("canvas");
      [canvas.width, canvas.height] = [columns, rows];
      canvas.style.display = heat.checked ? "block" : "none";
      const pixels = new ImageData(columns, rows);
      for (let patch = 0; patch < numPatches; patch++) {
        const sim = sims[image * numPatches + patch];
        pixels.data.set([...colour(sim), 255 * 0.68], patch * 4);
      }
      canvas.getContext("2d").putImageData(pixels, 0, 0);
      frame.querySelectorAll(".box").forEach((old) => old.remove());
      for (const i of found) if (Math.floor(i / numPatches) === image) box(frame, i % numPatches, "found");
      if (Math.floor(selected / numPatches) === image) box(frame, selected % numPatches, "query");
    });
    list.replaceChildren(
      ...found.map((index) => {
        const item = document.createElement("li");
        const button = document.createElement("button");
        const name = data.names[Math.floor(index / numPatches)];
        button.title = name;
        button.setAttribute("aria-label", `similarity ${sims[index].toFixed(2)}, ${name}: compare with this patch`);
        const caption = document.createElement("span");
        caption.textContent = `${sims[index].toFixed(2)} · image ${Math.floor(index / numPatches) + 1}`;
        button.append(cutOut(index), caption);
        button.addEventListener("click", () => select(index));
        item.append(button);
        return item;
      }),
    );
    document.querySelectorAll(".switch button").forEach((button, number) => {
      button.setAttribute("aria-pressed", String(data.encoders[number] === encoder));
    });
  }

  function select(index) {
    selected = index;
    history.replaceState(null, "", `#patch=${Math.floor(index / numPatches)},${index % numPatches}`);
    draw();
  }

  function fromHash() {
    const match = /^#patch=(\d+),(\d+)$/.exec(location.hash);
    if (!match || +match[1] >= numImages || +match[2] >= numPatches) return false;
    selected = +match[1] * numPatches + +match[2];
    return true;
  }

  function patchAt(frame, event) {
    const area = frame.getBoundingClientRect();
    const across = Math.floor(((event.clientX - area.left) / area.width) * columns);
    const down = Math.floor(((event.clientY - area.top) / area.height) * rows);
    return Math.min(Math.max(down, 0), rows - 1) * columns + Math.min(Math.max(across, 0), columns - 1);
  }

  frames.forEach((frame, image) => {
    frame.addEventListener("click", (event) => select(image * numPatches + patchAt(frame, event)));
    frame.addEventListener("mousemove", (event) => {
      const patch = patchAt(frame, event);
      tip.textContent = `${sims[image * numPatches + patch].toFixed(2)} · row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`;
      tip.hidden = false;
      tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 4) + "px";
      tip.style.top = event.clientY + 16 + "px";
    });
    frame.addEventListener("mouseleave", () => (tip.hidden = true));
    frame.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Enter: [0, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      const here = Math.floor(selected / numPatches) === image ? selected % numPatches : 0;
      const down = Math.min(Math.max(Math.floor(here / columns) + step[0], 0), rows - 1);
      const across = Math.min(Math.max((here % columns) + step[1], 0), columns - 1);
      select(image * numPatches + down * columns + across);
    });
  });
  document.querySelectorAll(".switch button").forEach((button, number) => {
    button.addEventListener("click", () => {
      encoder = data.encoders[number];
      draw();
    });
  });
  otherImages.addEventListener("change", draw);
  heat.addEventListener("change", draw);
  addEventListener("hashchange", () => fromHash() && draw());
  const ramp = STOPS.map((stop, i) => `rgb(${stop}) ${(i / (STOPS.length - 1)) * 100}%`);
  document.querySelector(".ramp").style.background = `linear-gradient(to right, ${ramp})`;
  if (fromHash()) document.getElementById("nearest").scrollIntoView();
  Promise.all(frames.map((frame) => frame.querySelector("img").decode().catch(() => {}))).then(draw);
})();
