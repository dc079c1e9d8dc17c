// The nearest-patch explorer: click a patch, see its cosine similarity to all patches of all images, and its attention to
// those of its own image.
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
  const attention = data.weights;
  const blocks = document.getElementById("block");
  const classToken = document.getElementById("class-token");
  const tip = document.querySelector(".tip");
  const LISTED = 8;

  for (const encoder of data.encoders) {
    encoder.vectors = new Int8Array(bytesOf(encoder.codes).buffer);
    encoder.norms = new Float32Array(numImages * numPatches);
    for (let i = 0; i < encoder.norms.length; i++) encoder.norms[i] = Math.sqrt(dot(encoder, i, i)) || 1;
  }

  if (attention) {
    attention.encoders.forEach((own, number) => {
      own.codes = bytesOf(own.codes);
      own.scales = new Float32Array(bytesOf(own.scales).buffer);
      data.encoders[number].attention = own;
    });
    attention.keys = numCells(attention.key_step);
    attention.queries = numCells(attention.query_step);
  }

  let shown = "similarity"; // over the images: similarity, weights (attention) or nothing
  let head = -1; // -1: the mean over heads
  let encoder = data.encoders[0];
  let selected = data.start[0] * numPatches + data.start[1];
  let sims = new Float32Array(0);
  let weights = null; // attention shown over the selected image

  function bytesOf(text) {
    return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  }

  // Patches are merged to square cells of `step` patches.
  function numCells(step) {
    return Math.ceil(rows / step) * Math.ceil(columns / step);
  }

  function cellOf(patch, step) {
    return Math.floor(Math.floor(patch / columns) / step) * Math.ceil(columns / step) + Math.floor((patch % columns) / step);
  }

  // Attention of the selected patch (or the class token of its image) to the cells of its image, for each head; null for
  // an image without.
  function attended() {
    const own = encoder.attention;
    const slot = attention.images.indexOf(Math.floor(selected / numPatches));
    if (slot < 0) return null;
    const isClass = classToken && classToken.checked && own.class_token;
    const row = isClass ? 0 : (own.class_token ? 1 : 0) + cellOf(selected % numPatches, attention.query_step);
    const numRows = attention.queries + (own.class_token ? 1 : 0);
    return Array.from({ length: own.heads }, (_, number) => {
      const place = ((slot * own.blocks + +blocks.value) * own.heads + number) * numRows + row;
      const codes = own.codes.subarray(place * attention.keys, (place + 1) * attention.keys);
      return Float32Array.from(codes, (code) => (code / 255) ** 2 * own.scales[place]);
    });
  }

  function meanOf(maps) {
    return maps[0].map((_, cell) => maps.reduce((sum, map) => sum + map[cell], 0) / maps.length);
  }

  // One value a patch, from dark (0) to pale (1).
  function paint(canvas, valueOf, opacity) {
    [canvas.width, canvas.height] = [columns, rows];
    const pixels = new ImageData(columns, rows);
    for (let patch = 0; patch < numPatches; patch++) pixels.data.set([...colour(valueOf(patch)), 255 * opacity], patch * 4);
    canvas.getContext("2d").putImageData(pixels, 0, 0);
  }

  // The square root, so that one large weight does not hide all others.
  function paintAttention(canvas, map, opacity) {
    const largest = Math.max(...map);
    paint(canvas, (patch) => Math.sqrt(map[cellOf(patch, attention.key_step)] / largest), opacity);
  }

  function drawAttention() {
    const maps = attended();
    const note = document.querySelector(".attended .note");
    note.hidden = maps !== null;
    note.textContent = `Kept for image${attention.images.length > 1 ? "s" : ""} ${attention.images.map((i) => i + 1).join(", ")}: click a patch there.`;
    const named = maps ? [["mean over heads", meanOf(maps)], ...maps.map((map, n) => [`head ${n + 1}`, map])] : [];
    document.querySelector(".attended ol").replaceChildren(
      ...named.map(([name, map], number) => {
        const item = document.createElement("li");
        const button = document.createElement("button");
        const canvas = document.createElement("canvas");
        const caption = document.createElement("span");
        paintAttention(canvas, map, 1);
        caption.textContent = name;
        button.setAttribute("aria-pressed", String(shown === "weights" && head === number - 1));
        button.setAttribute("aria-label", `${name}: show over the image`);
        button.append(canvas, caption);
        button.addEventListener("click", () => {
          [shown, head] = ["weights", number - 1];
          draw();
        });
        item.append(button);
        return item;
      }),
    );
    return maps && (head < 0 ? meanOf(maps) : maps[Math.min(head, maps.length - 1)]);
  }

  function chooseBlocks() {
    if (!attention) return;
    const wanted = blocks.value === "" ? encoder.attention.blocks - 1 : Math.min(+blocks.value, encoder.attention.blocks - 1);
    blocks.replaceChildren(
      ...Array.from({ length: encoder.attention.blocks }, (_, number) => new Option(`${number + 1} of ${encoder.attention.blocks}`, number)),
    );
    blocks.value = wanted;
  }

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

  // A frame around a patch, or around its cell.
  function box(frame, patch, kind, step = 1) {
    const element = document.createElement("div");
    const [left, top] = [patch % columns, Math.floor(patch / columns)].map((place) => place - (place % step));
    element.className = "box " + kind;
    element.style.left = (left / columns) * 100 + "%";
    element.style.top = (top / rows) * 100 + "%";
    element.style.width = (Math.min(step, columns - left) / columns) * 100 + "%";
    element.style.height = (Math.min(step, rows - top) / rows) * 100 + "%";
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
    weights = attention ? drawAttention() : null;
    frames.forEach((frame, image) => {
      const canvas = frame.querySelector("canvas");
      const isOwn = Math.floor(selected / numPatches) === image;
      const isShown = shown === "similarity" || (shown === "weights" && isOwn && weights !== null);
      canvas.style.display = isShown ? "block" : "none";
      if (isShown && shown === "similarity") paint(canvas, (patch) => sims[image * numPatches + patch], 0.68);
      if (isShown && shown === "weights") paintAttention(canvas, weights, 0.8);
      frame.querySelectorAll(".box").forEach((old) => old.remove());
      for (const i of shown === "weights" ? [] : found) if (Math.floor(i / numPatches) === image) box(frame, i % numPatches, "like");
      const isCell = shown === "weights" && weights !== null;
      const isClass = isCell && classToken && classToken.checked;
      if (isOwn && !isClass) box(frame, selected % numPatches, "query", isCell ? attention.query_step : 1);
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
    document.querySelectorAll(".encoders button").forEach((button, number) => {
      button.setAttribute("aria-pressed", String(data.encoders[number] === encoder));
    });
    document.querySelectorAll(".shown button").forEach((button) => {
      button.setAttribute("aria-pressed", String(button.value === shown));
    });
    document.querySelector(".explorer").classList.toggle("attending", shown === "weights");
    const scale = document.getElementById("scale");
    scale.style.visibility = shown === "nothing" ? "hidden" : "visible";
    scale.firstChild.textContent = shown === "weights" ? "attention 0" : "similarity 0";
    scale.lastChild.textContent = shown === "weights" ? "largest (square root)" : "1";
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

  function valueAt(image, patch) {
    if (shown !== "weights") return `${sims[image * numPatches + patch].toFixed(2)} · `;
    const isOwn = Math.floor(selected / numPatches) === image;
    return isOwn && weights ? `${(100 * weights[cellOf(patch, attention.key_step)]).toFixed(2)} % · ` : "";
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
      tip.textContent = `${valueAt(image, patch)}row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`;
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
  document.querySelectorAll(".encoders button").forEach((button, number) => {
    button.addEventListener("click", () => {
      encoder = data.encoders[number];
      chooseBlocks();
      draw();
    });
  });
  document.querySelectorAll(".shown button").forEach((button) => {
    button.addEventListener("click", () => {
      shown = button.value;
      draw();
    });
  });
  otherImages.addEventListener("change", draw);
  if (blocks) blocks.addEventListener("change", draw);
  if (classToken) classToken.addEventListener("change", draw);
  chooseBlocks();
  addEventListener("hashchange", () => fromHash() && draw());
  const ramp = STOPS.map((stop, i) => `rgb(${stop}) ${(i / (STOPS.length - 1)) * 100}%`);
  document.querySelector(".ramp").style.background = `linear-gradient(to right, ${ramp})`;
  if (fromHash()) document.getElementById("nearest").scrollIntoView();
  Promise.all(frames.map((frame) => frame.querySelector("img").decode().catch(() => {}))).then(draw);
})();
