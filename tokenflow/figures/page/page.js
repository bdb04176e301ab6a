"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const MAX_LOADED = 48; // browsers refuse more than some 75 videos at once
  const RATES = [0.1, 0.25, 0.5, 1, 2];
  const MIN_RATE = 0.0625, MAX_RATE = 16; // what browsers accept

  // ---- building the page: text only ever becomes a text node or an attribute's value

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  const ICONS = {
    play: "M4 2.5v11l9.5-5.5z",
    pause: "M3.5 2.5h3.2v11H3.5zM9.3 2.5h3.2v11H9.3z",
    back: "M11.5 2.5v11L5 8zM2.8 2.5h1.9v11H2.8z",
    forward: "M4.5 2.5v11L11 8zM11.3 2.5h1.9v11h-1.9z",
  };

  function icon(name) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    svg.setAttribute("viewBox", "0 0 16 16");
    svg.setAttribute("aria-hidden", "true");
    path.setAttribute("d", ICONS[name]);
    svg.append(path);
    return svg;
  }

  function longText(text) {
    const shown = make("span", { class: "text", dir: "auto" }, text);
    if (text.length < 240 && text.split("\n").length < 5) return [shown];
    shown.classList.add("long");
    const more = make("button", { type: "button", class: "more", "aria-expanded": "false" }, "show all");
    more.addEventListener("click", () => {
      const open = shown.classList.toggle("long") === false;
      more.textContent = open ? "show less" : "show all";
      more.setAttribute("aria-expanded", open);
    });
    return [shown, make("br"), more];
  }

  function pairs(list, kind = "") {
    const box = make("dl", { class: `pairs ${kind}` });
    for (const [name, value] of list) {
      box.append(make("dt", { dir: "auto" }, name), make("dd", { dir: "auto" }, value));
    }
    return box;
  }

  const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

  function figure(metric, value) {
    if (value === undefined) return "–";
    return (value / metric.scale).toFixed(metric.digits);
  }

  // ---- videos

  // A video with what the page knows of it. It has a source only while it is near the window.
  class Screen {
    constructor(video, player) {
      Object.assign(this, { video, player, near: false, loaded: false, begun: false, failed: false });
      this.element = make("video", {
        width: video.width, height: video.height, preload: "none", playsinline: true,
        class: Math.max(video.width, video.height) <= 128 ? "small" : "",
      });
      this.element.muted = true;
      this.element.addEventListener("click", () => player.toggle());
      this.element.addEventListener("loadeddata", () => this.join());
      this.element.addEventListener("error", () => this.fail());
      this.drawn = null; // the time of the frame that is on the screen, where the browser tells
      this.nudges = 0;
      if (this.element.requestVideoFrameCallback) {
        const note = (now, frame) => {
          this.drawn = frame.mediaTime;
          this.element.requestVideoFrameCallback(note);
        };
        this.element.requestVideoFrameCallback(note);
        this.element.addEventListener("seeked", () => setTimeout(() => this.check(), 120));
      }
    }

    // Chromium now and then goes on showing a video's first frame after the first seek: seek again.
    check() {
      const { element, video } = this;
      if (!this.ready || !element.paused || element.seeking || this.nudges >= 5) return;
      if (this.drawn !== null && Math.round(this.drawn * video.fps) === Math.floor(this.position)) return;
      this.nudges++;
      element.currentTime += (this.nudges % 2 ? 0.1 : -0.1) / video.fps;
    }

    get ready() { return this.begun && !this.failed; }
    get position() { return this.element.currentTime * this.video.fps; } // in frames
    get settled() {
      if (!this.loaded || this.failed) return true;
      return this.begun && this.element.readyState >= 2 && !this.element.seeking;
    }

    load() {
      if (!this.loaded) {
        this.loaded = true;
        this.failed = false;
        this.element.preload = "none";
        this.element.src = this.video.src;
      }
      if (this.player.active) this.element.preload = "auto";
    }

    unload() {
      if (!this.loaded) return;
      this.loaded = this.begun = false;
      this.element.removeAttribute("src");
      this.element.load();
    }

    // Take part in what the clip is doing: this video came into view when others were there.
    join() {
      this.begun = this.loaded;
      if (!this.player.active || !this.begun) return;
      this.seek(this.player.position);
      if (this.player.running) this.start();
    }

    // To a place in frames; whole frames are sought at their middle, where rounding is harmless.
    seek(frame) {
      if (!this.ready) return;
      this.nudges = 0;
      const last = this.video.frames - 1;
      const time = (Math.min(Number.isInteger(frame) ? frame + 0.5 : frame, last + 0.5)) / this.video.fps;
      if (Math.abs(this.element.currentTime - time) > 1e-4) this.element.currentTime = time;
    }

    start() { this.element.play().catch(() => {}); } // refused only if it was paused meanwhile

    rate(frames_per_second) {
      const rate = Math.min(MAX_RATE, Math.max(MIN_RATE, frames_per_second / this.video.fps));
      if (this.element.playbackRate !== rate) this.element.playbackRate = rate;
    }

    fail() {
      if (!this.loaded || !this.element.getAttribute("src")) return;
      this.failed = true;
      this.message ??= make("p", { class: "failed", role: "status" },
        "This browser cannot play the video (H.264), or its file is missing.");
      this.element.after(this.message);
    }
  }

  // All videos of a clip. Time is counted in frames: frame i of an edit belongs to frame i of the
  // source, whatever their rates are. While playing, the first video in view leads.
  class Player {
    constructor(fps) {
      this.fps = fps;
      this.screens = [];
      this.position = 0; // in frames; whole while paused
      this.frames = 1;
      this.speed = 1;
      this.loop = true;
      this.active = false; // used at least once: from then on its videos load
      this.playing = false; // what the button says
      this.running = false; // the videos are moving
      this.turn = 0; // of the last command: an older one that waited is void
      this.changed = () => {};
    }

    add(video) {
      const screen = new Screen(video, this);
      this.frames = Math.min(video.frames, this.screens.length ? this.frames : video.frames);
      this.screens.push(screen);
      watch(screen);
      return screen;
    }

    get live() { return this.screens.filter((screen) => screen.ready); }
    get frame() { return Math.max(0, Math.min(this.frames - 1, Math.floor(this.position))); }

    toggle() { if (this.playing) this.pause(); else this.play(); }

    activate() {
      if (current !== this) {
        if (current) current.pause();
        current = this;
      }
      this.active = true;
      allot();
    }

    play() {
      this.activate();
      this.playing = true;
      if (this.frame === this.frames - 1) this.position = 0;
      this.changed();
      return this.begin(this.frame);
    }

    // Bring all videos to a frame, wait until they show it, and start them together.
    async begin(frame) {
      const turn = ++this.turn;
      this.running = false;
      for (const screen of this.screens) screen.element.pause();
      this.position = frame;
      for (const screen of this.live) screen.seek(frame);
      const deadline = performance.now() + 5000;
      do {
        await new Promise(requestAnimationFrame);
        if (turn !== this.turn) return;
      } while (performance.now() < deadline && !this.screens.every((screen) => screen.settled));
      this.running = true;
      for (const screen of this.live) {
        screen.rate(this.speed * this.fps);
        screen.start();
      }
      requestAnimationFrame(() => this.follow(turn));
    }

    // Once per drawn frame: read the leader's time, hold the others to it.
    follow(turn) {
      if (turn !== this.turn || !this.playing) return;
      const [leader, ...others] = this.live;
      if (!leader) {
        if (this.screens.some((screen) => screen.loaded && !screen.failed)) {
          requestAnimationFrame(() => this.follow(turn)); // one is on its way
        } else this.pause(); // scrolled out of view
        return;
      }
      this.position = leader.position;
      if (leader.element.ended || this.position >= this.frames) {
        if (this.loop) this.begin(0);
        else this.pause(this.frames - 1);
        return;
      }
      const rate = this.speed * this.fps;
      let behind = 0;
      for (const screen of others) {
        const ahead = screen.position - this.position;
        behind = Math.max(behind, -ahead);
        if (Math.abs(ahead) > 3 && !screen.element.seeking) screen.seek(this.position + 1e-3);
        else screen.rate(rate * Math.min(2, Math.max(0.4, 1 - 0.6 * ahead)));
        if (screen.element.paused && !screen.element.ended) screen.start();
      }
      leader.rate(behind > 0.7 ? rate / 2 : rate); // a slow computer: wait for the last one
      if (leader.element.paused) leader.start();
      this.changed();
      requestAnimationFrame(() => this.follow(turn));
    }

    pause(frame = this.frame) {
      this.turn++;
      this.playing = this.running = false;
      this.position = frame;
      for (const screen of this.screens) screen.element.pause();
      for (const screen of this.live) screen.seek(frame);
      this.changed();
    }

    show(frame) {
      this.activate();
      this.pause(Math.max(0, Math.min(this.frames - 1, frame)));
    }
  }

  let current = null; // the player used last
  const screens = new Map(); // by element, in the page's order
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const screen = screens.get(entry.target);
      screen.near = entry.isIntersecting;
      if (screen.near) screen.element.poster = screen.video.poster;
    }
    allot();
  }, { rootMargin: "40% 0px" });

  function watch(screen) {
    screens.set(screen.element, screen);
    observer.observe(screen.element);
  }

  // Load what is near the window, the clip in use first, and no more than a browser bears.
  function allot() {
    const near = [...screens.values()].filter((screen) => screen.near);
    near.sort((a, b) => (b.player === current) - (a.player === current));
    const chosen = new Set(near.slice(0, MAX_LOADED));
    for (const screen of screens.values()) if (!chosen.has(screen)) screen.unload();
    for (const screen of chosen) screen.load();
  }

  // ---- a clip

  function controls(player, name) {
    const button = (label, sign, action) => {
      const element = make("button", { type: "button", "aria-label": label, title: label }, icon(sign));
      element.addEventListener("click", action);
      return element;
    };
    const play = button("Play", "play", () => player.toggle());
    play.classList.add("play");
    const scrubber = make("input", {
      type: "range", min: 0, max: player.frames - 1, step: 1, value: 0, "aria-label": "Frame",
    });
    scrubber.addEventListener("input", () => player.show(Number(scrubber.value)));
    const counter = make("span", { class: "frame" });
    const speed = make("select", { "aria-label": "Speed" },
      ...RATES.map((rate) => make("option", { value: rate, selected: rate === 1 }, `${rate}×`)));
    speed.addEventListener("change", () => { player.speed = Number(speed.value); });
    const loop = make("input", { type: "checkbox", checked: true });
    loop.addEventListener("change", () => { player.loop = loop.checked; });

    let shown = null, sign = null;
    player.changed = () => {
      if (shown !== player.frame) {
        shown = player.frame;
        scrubber.value = shown;
        counter.textContent = `${shown + 1} / ${player.frames}`;
        scrubber.setAttribute("aria-valuetext", `frame ${shown + 1} of ${player.frames}`);
      }
      if (sign !== player.playing) {
        sign = player.playing;
        const label = sign ? "Pause" : "Play";
        play.replaceChildren(icon(sign ? "pause" : "play"));
        play.setAttribute("aria-label", label);
        play.title = label;
      }
    };
    player.changed();
    return make("div", { class: "player", role: "group", "aria-label": `Playback of ${name}` },
      make("span", { class: "keys" },
        button("Previous frame", "back", () => player.show(player.frame - 1)),
        play,
        button("Next frame", "forward", () => player.show(player.frame + 1))),
      scrubber, counter, speed,
      make("label", { class: "field" }, loop, "Loop"));
  }

  function referenceTile(reference, player) {
    const screen = player.add(reference.video);
    screen.element.setAttribute("aria-label", reference.label);
    const caption = make("figcaption", {}, make("h3", {}, reference.label));
    if (reference.facts.length) caption.append(pairs(reference.facts));
    return make("figure", { class: "tile" }, screen.element, caption);
  }

  function editTile(edit, player, clip) {
    const screen = player.add(edit.video);
    screen.element.setAttribute("aria-label", `Edit: ${edit.label}`);
    const caption = make("figcaption", {}, make("h3", { dir: "auto" }, edit.label));
    if (clip.prompt === null) caption.append(make("p", {}, ...longText(edit.prompt)));
    if (edit.differing.length) caption.append(pairs(edit.differing, "settings"));
    const measured = data.metrics.filter((metric) => metric.key in edit.metrics);
    if (measured.length) {
      caption.append(pairs(measured.map((metric) => [
        metric.label, `${figure(metric, edit.metrics[metric.key])} ${metric.unit}`,
      ])));
    }
    caption.append(more(edit));
    return make("figure", { class: "tile", id: edit.id, tabindex: "-1" }, screen.element, caption);
  }

  // Files, settings and the run's record, built when they are first asked for.
  function more(edit) {
    const box = make("details", {}, make("summary", {}, "Files and settings"));
    box.addEventListener("toggle", () => {
      if (box.childElementCount > 1) return;
      const files = make("ul", { class: "files" });
      for (const file of [{ name: "video in this report", href: edit.video.src }, ...edit.files]) {
        if (file.href !== null) files.append(make("li", {}, make("a", { href: file.href }, file.name)));
      }
      box.append(make("h4", {}, "Files"), files, make("p", { class: "quiet", dir: "auto" }, edit.path));
      const lists = [["Settings", edit.settings], ["Run", edit.run], ["How it was measured", edit.protocol]];
      for (const [title, list] of lists) {
        if (list.length) box.append(make("h4", {}, title), pairs(list));
      }
    });
    return box;
  }

  function clipSection(clip, index) {
    const videos = [...clip.references, ...clip.edits].map((item) => item.video);
    const { fps, width, height } = videos[0];
    const player = new Player(fps);
    const heading = make("h2", { id: `clip-${index}`, dir: "auto" }, clip.name);
    const about = make("dl", { class: "about" });
    const say = (name, ...values) =>
      about.append(make("dt", {}, name), make("dd", {}, ...values));
    const tiles = make("div", { class: "tiles" },
      ...clip.references.map((reference) => referenceTile(reference, player)),
      ...clip.edits.map((edit) => editTile(edit, player, clip)));
    const longest = Math.max(...videos.map((video) => video.frames));
    const cut = player.frames < longest ? `the first ${player.frames} of ${longest} frames` : plural(longest, "frame");
    say("Clip", `${cut} at ${Number(fps.toFixed(3))} fps, ${width}×${height}`);
    const namesakes = data.clips.filter((other) => other.name === clip.name);
    if (namesakes.length > 1) say("From", ...longText(clip.data_path));
    for (const prompt of clip.source_prompts) say("Source prompt", ...longText(prompt));
    if (clip.prompt !== null) say("Prompt", ...longText(clip.prompt));
    const section = make("section", { class: "clip-section", "aria-labelledby": `clip-${index}` },
      heading, about, ...clip.notes.map((note) => make("p", { class: "quiet" }, note)),
      controls(player, clip.name), tiles);
    return { section, player };
  }

  // ---- the table

  const columns = [
    { label: "Method", value: (row) => row.edit.label },
    { label: "Clip", value: (row) => row.clip.name },
    { label: "Prompt", value: (row) => row.edit.prompt },
    ...data.metrics.map((metric) => ({ ...metric, metric, value: (row) => row.edit.metrics[metric.key] })),
  ];
  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

  // Missing values come last either way.
  function compare(a, b, column, sign) {
    const [x, y] = [column.value(a), column.value(b)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return sign * (column.metric ? x - y : collator.compare(x, y));
  }

  function tableRow(row) {
    const cells = columns.slice(3).map((column) =>
      make("td", { class: "number" }, figure(column.metric, column.value(row))));
    return make("tr", {},
      make("th", { scope: "row" }, make("a", { href: `#${row.edit.id}`, dir: "auto" }, row.edit.label),
        row.edit.hint ? make("span", { class: "hint quiet", dir: "auto" }, row.edit.hint) : null),
      make("td", { class: "clip" }, make("a", { href: `#clip-${row.index}`, dir: "auto" }, row.clip.name)),
      make("td", { class: "prompt" }, make("span", { dir: "auto" }, row.edit.prompt)),
      ...cells);
  }

  const BETTER = { low: ["↓", "lower is better"], high: ["↑", "higher is better"], "": ["", ""] };

  function buildTable(rows) {
    const body = make("tbody", {}, ...rows.map((row) => row.line));
    const head = make("tr");
    const arrows = { ascending: "▲", descending: "▼", none: "" };
    for (const column of columns) {
      const arrow = make("span", { class: "arrow", "aria-hidden": "true" });
      const button = make("button", { type: "button" },
        ...(column.metric ? [arrow, column.label] : [column.label, arrow]));
      if (column.metric) {
        const [sign, words] = BETTER[column.better];
        button.append(make("span", { class: "unit" }, column.unit, column.unit && sign ? " " : "\u200b",
          make("span", { "aria-hidden": "true" }, sign), make("span", { class: "hidden-text" }, words)));
        button.title = words;
      }
      const cell = make("th", { scope: "col", "aria-sort": "none", class: column.metric ? "number" : "" }, button);
      column.mark = (order) => {
        cell.setAttribute("aria-sort", order);
        arrow.textContent = arrows[order];
      };
      button.addEventListener("click", () => {
        const first = column.better === "high" ? "descending" : "ascending";
        const second = first === "ascending" ? "descending" : "ascending";
        const order = cell.getAttribute("aria-sort") === first ? second : first;
        for (const other of columns) other.mark("none");
        column.mark(order);
        rows.sort((a, b) => compare(a, b, column, order === "ascending" ? 1 : -1));
        body.append(...rows.map((row) => row.line));
      });
      head.append(cell);
    }
    columns[1].mark("ascending");
    return make("table", {},
      make("caption", { class: "hidden-text" }, "All results; the buttons in the first row sort it"),
      make("thead", {}, head), body);
  }

  // ---- the page

  const rows = [], shownClips = [];
  data.clips.forEach((clip, index) => {
    clip.edits.forEach((edit, number) => { edit.id = `result-${index}-${number}`; });
    const shown = clipSection(clip, index);
    shownClips.push(shown);
    for (const edit of clip.edits) {
      const words = [edit.label, clip.name, edit.prompt, edit.path, ...edit.differing.flat()];
      const row = { clip, edit, index, text: words.join("\n").toLowerCase() };
      row.line = tableRow(row);
      rows.push(row);
    }
  });
  document.getElementById("title").textContent = data.title;
  document.getElementById("summary").textContent =
    `${plural(rows.length, "result")} of ${plural(data.clips.length, "clip")}`;
  document.getElementById("made").textContent = `Written ${data.made} by report.py.`;
  document.getElementById("protocol").textContent = data.protocols_differ
    ? "Not all figures were measured in the same way: see \u201cHow it was measured\u201d of each result."
    : data.protocol.filter(([name, value]) => !name.startsWith("versions.") && value !== "null")
        .map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`).join(" · ");
  document.getElementById("table").append(buildTable(rows));
  document.getElementById("clips").append(...shownClips.map((shown) => shown.section));

  const count = document.getElementById("count");
  document.getElementById("filter").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    const left = new Set();
    let visible = 0;
    for (const row of rows) {
      const match = words.every((word) => row.text.includes(word));
      row.line.hidden = !match;
      document.getElementById(row.edit.id).hidden = !match;
      if (match) { visible++; left.add(row.index); }
    }
    shownClips.forEach(({ section }, index) => { section.hidden = !left.has(index); });
    count.textContent = words.length ? `${visible} of ${plural(rows.length, "result")}` : "";
  });
  const size = document.getElementById("size");
  const resize = () => document.documentElement.style.setProperty("--tile", size.value);
  if (innerWidth < 480) size.selectedIndex = 0; // two videos side by side
  size.addEventListener("change", resize);
  resize();

  // ---- keys: for the clip that has the focus, else the one used last, else the first in view

  function playerForKeys() {
    const visible = ({ section }) => {
      const box = section.getBoundingClientRect();
      return !section.hidden && box.bottom > 0 && box.top < innerHeight;
    };
    const focused = shownClips.find(({ section }) => section.contains(document.activeElement));
    const used = shownClips.find((shown) => shown.player === current && visible(shown));
    return (focused ?? used ?? shownClips.find(visible))?.player;
  }

  document.addEventListener("keydown", (event) => {
    const target = event.target;
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (target.closest("input, select, textarea, .scroll")) return;
    if (event.key === " " && target.closest("button, a, summary")) return;
    const player = playerForKeys();
    if (!player) return;
    const step = event.shiftKey ? 10 : 1;
    const actions = {
      " ": () => player.toggle(),
      ArrowLeft: () => player.show(player.frame - step),
      ArrowRight: () => player.show(player.frame + step),
      Home: () => player.show(0),
      End: () => player.show(player.frames - 1),
    };
    const isHomeOutside = ["Home", "End"].includes(event.key) && target === document.body;
    if (!(event.key in actions) || isHomeOutside) return;
    event.preventDefault();
    actions[event.key]();
  });
})();
