// Fills the page "Try flags out" from the figures that the site generator has put into it.
(function () {
  const holder = document.getElementById('explore');
  const source = document.getElementById('explore-data');
  if (!holder || !source) return;
  const data = JSON.parse(source.textContent);

  const labels = {
    width: 'width', depth: 'blocks', keys: 'key and value heads', positions: 'positions', window: 'a query sees',
    forward: 'feed-forward', norm: 'norm', scheme: 'residual scheme',
  };
  const state = { width: '512', depth: 6 };
  for (const [name, options] of Object.entries(data.choices)) state[name] = Object.keys(options)[0];

  function element(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function chooser(name, options) {
    const select = element('select', { id: 'explore-' + name });
    for (const option of options) select.append(element('option', { value: option }, option));
    select.value = state[name];
    select.addEventListener('change', () => { state[name] = select.value; update(); });
    return element('label', { for: 'explore-' + name }, labels[name], select);
  }

  function slider() {
    const shown = element('output', {}, String(state.depth));
    const input = element('input', { type: 'range', min: 1, max: 48, value: state.depth, id: 'explore-depth' });
    input.addEventListener('input', () => { state.depth = Number(input.value); shown.textContent = input.value; update(); });
    return element('label', { for: 'explore-depth' }, labels.depth, element('span', { class: 'slider' }, input, shown));
  }

  function python(value) {
    if (value === true) return 'True';
    if (value === false) return 'False';
    return JSON.stringify(value);
  }

  function code() {
    const width = data.widths[state.width];
    const flags = { dim: width, depth: state.depth, heads: width / data.dim_head };
    for (const name of Object.keys(data.choices)) Object.assign(flags, data.choices[name][state[name]]);
    const keywords = Object.entries(flags).map(([name, value]) => `${name}=${python(value)}`);
    return `TransformerWrapper(\n    num_tokens=${data.vocabulary},\n    max_seq_len=${data.seq_len},\n` +
      `    attn_layers=Decoder(${keywords.join(', ')}),\n)`;
  }

  // [parameters, operations per token, bytes of the cache]
  function figures() {
    const found = data.measured[state.width];
    const parts = [
      found.attention[`${state.keys}|${state.positions}|${state.window}`],
      found.added[`${state.scheme}|${state.forward}`],
      found.added[state.norm],
    ];
    return [0, 1, 2].map((n) => parts.reduce((sum, [block, ends]) => sum + state.depth * block[n] + ends[n], 0));
  }

  function short(value) {
    const units = [[1e9, ' G'], [1e6, ' M'], [1e3, ' k']];
    for (const [size, name] of units) if (value >= size) return (value / size).toFixed(value >= 10 * size ? 0 : 1) + name;
    return String(Math.round(value));
  }

  // one square per pair of places; value 0 … 1 is how strongly it is painted, null: not seen at all
  function grid(canvas, rows) {
    const cell = 9, n = rows.length;
    canvas.width = canvas.height = n * cell;
    const pen = canvas.getContext('2d');
    const ink = getComputedStyle(holder).color;
    pen.clearRect(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) {
      pen.globalAlpha = rows[i][j] === null ? 0.06 : 0.12 + 0.8 * Math.max(0, rows[i][j]);
      pen.fillStyle = rows[i][j] === null ? ink : '#0072b2';
      pen.fillRect(j * cell, i * cell, cell - 1, cell - 1);
    }
  }

  const controls = element('div', { class: 'controls' }, chooser('width', Object.keys(data.widths)), slider());
  for (const [name, options] of Object.entries(data.choices)) controls.append(chooser(name, Object.keys(options)));
  const line = element('code', {});
  const numbers = element('div', { class: 'figures', 'aria-live': 'polite' });
  const seen = element('canvas', { role: 'img', 'aria-label': 'which keys a query sees' });
  const scores = element('canvas', { role: 'img', 'aria-label': 'what positions do to the weights' });
  const block = element('div', { class: 'one-block' });
  holder.append(
    controls, element('pre', {}, line), numbers,
    element('div', { class: 'drawn' }, block,
      element('figure', {}, seen, element('figcaption', {}, 'attention mask')),
      element('figure', {}, scores, element('figcaption', {}, 'with positions'))),
  );

  function update() {
    line.textContent = code();
    const [parameters, operations, cache] = figures();
    numbers.replaceChildren();
    for (const [value, name] of [
      [short(parameters), 'parameters'], [short(4 * parameters) + 'B', 'of weights'],
      [short(operations) + 'FLOP', 'per token, forward'], [short(cache) + 'B', `cache of ${data.seq_len} tokens`],
    ]) numbers.append(element('div', {}, element('strong', {}, value), name));
    const mask = data.masks[state.window], strength = data.scores[state.positions];
    grid(seen, mask.map((row) => row.map((allowed) => (allowed ? 1 : null))));
    grid(scores, mask.map((row, i) => row.map((allowed, j) => (allowed ? strength[i][j] : null))));
    block.innerHTML = data.blocks[state.scheme].svg;
    block.append(element('p', {}, `× ${state.depth} — ${data.blocks[state.scheme].says}`));
  }

  update();
  // the pictures take the colours of the page, which the reader may change
  new MutationObserver(update).observe(document.body, { attributes: true, attributeFilter: ['data-md-color-scheme'] });
})();
