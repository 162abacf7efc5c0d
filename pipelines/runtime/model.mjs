// Runs the model of a bundle in a browser: what infer.py does, as manifest.json says, with onnxruntime-web and @huggingface/tokenizers.
// The resampling is Pillow's, to the bit, so that the model sees the pixels that it was trained on; a canvas, with which transformers.js
// resizes, gives others.

// Opens the bundle at the URL `base`, whose web/ holds the libraries. predict(), search(), answer() and continueText() work with what this returns.
export async function openBundle(base) {
    const read = async (name) => {
        // A bundle that was rebuilt must not meet files of the old one in the browser's cache.
        const response = await fetch(new URL(name, base), {cache: "no-cache"});
        if (!response.ok) throw new Error(`expected the bundle's ${name}, found: ${response.status} ${response.statusText}`);
        return response.arrayBuffer();
    };
    const parse = (bytes) => JSON.parse(new TextDecoder().decode(bytes));
    const manifest = parse(await read("manifest.json"));
    const readChecked = async (name) => {
        const bytes = await read(name);
        await checkFile(name, bytes, manifest.files[name]);
        return bytes;
    };
    const ort = await import("./ort.wasm.min.mjs");
    ort.env.wasm.wasmPaths = new URL("web/", base).href;
    // More threads need headers that a plain file server does not send.
    ort.env.wasm.numThreads = 1;
    ort.env.logLevel = "error";
    const session = await ort.InferenceSession.create(await readChecked(manifest.model));
    const bundle = {manifest, ort, session, runtime: `ONNX Runtime ${ort.env.versions.web}`};
    if (manifest.inputs.kind === "text") {
        const {Tokenizer} = await import("./tokenizers.min.mjs");
        const files = await Promise.all(["tokenizer.json", "tokenizer_config.json"].map(readChecked));
        bundle.tokenizer = new Tokenizer(...files.map(parse));
        checkTokens(bundle);
    }
    return bundle;
}

async function checkFile(name, bytes, expected) {
    // Browsers give digests only to pages from https and from this machine.
    const digest = crypto.subtle && new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    const checksum = digest && Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (bytes.byteLength !== expected.bytes || (checksum ?? expected.sha256) !== expected.sha256) {
        throw new Error(
            `expected ${name} of ${expected.bytes} bytes as it was built, found that it was changed or cut (${bytes.byteLength} bytes). ` +
            "Reload the page, or copy the bundle again.",
        );
    }
}

// The library that makes tokens here is another than the model was trained with, so it is tried on texts whose tokens are known.
function checkTokens({manifest, tokenizer}) {
    for (const {texts, ids, offsets} of manifest.inputs.probes) {
        const continued = manifest.outputs.kind === "continuation";
        const found = continued ? promptTokens(tokenizer, texts[0], manifest.outputs.end_tokens) : textColumns(tokenizer, texts, manifest.inputs).input_ids;
        const count = offsets?.split(" ").length;
        if (found.join(" ") !== ids || (offsets ?? "") !== codePointOffsets(tokenizer, texts[0], count)) {
            throw new Error(
                `expected the tokens that the model was trained with for ${JSON.stringify(texts[0].slice(0, 30))}, found others: this ` +
                "page's library does not support this tokenizer. Use the bundle's infer.py.",
            );
        }
    }
}

// The prediction for one example, an array of one or two texts or an image {data, width, height}: what readOutputs() gives, and the
// milliseconds of preparing and running.
export async function predict(bundle, example) {
    if (bundle.manifest.outputs.ranks) return rank(bundle, ...example);
    const start = performance.now();
    if (bundle.manifest.outputs.kind === "spans") {
        return {spans: await findInText(bundle, example[0]), milliseconds: performance.now() - start};
    }
    const outputs = await bundle.session.run(prepare(bundle, example));
    const milliseconds = performance.now() - start;
    const logits = Array.from(outputs[bundle.manifest.outputs.output ?? bundle.session.outputNames[0]].data);
    return {...readOutputs(logits, bundle.manifest.outputs), milliseconds};
}

// The lines of a text by their cosine with a query, which is an array of both: names, cosines, and the milliseconds of it. Vectors of lines are
// kept, so that another query takes one run of the model.
export async function search(bundle, [query, text]) {
    const start = performance.now();
    const names = [...new Set(text.split("\n").map((line) => line.trim()).filter(Boolean))];
    const vectors = (bundle.vectors ??= new Map());
    for (const line of [query, ...names]) {
        if (!vectors.has(line)) vectors.set(line, (await predict(bundle, [line])).vector);
    }
    const logits = names.map((line) => cosine(vectors.get(query), vectors.get(line)));
    return {names, logits, cosines: logits, milliseconds: performance.now() - start};
}

export function cosine(left, right) {
    const dot = (a, b) => a.reduce((sum, value, place) => sum + value * b[place], 0);
    return dot(left, right) / (Math.sqrt(dot(left, left) * dot(right, right)) || 1);
}

// What a model's outputs say: names, their logits, and probabilities unless they are values; or the vector of a text.
export function readOutputs(logits, {kind, names, labels, activation}) {
    if (kind === "vector") return {vector: logits};
    if (kind === "values") return {names, logits};
    const sigmoid = (logit) => 1 / (1 + Math.exp(-logit));
    const activations = {softmax, sigmoid: (values) => values.map(sigmoid), none: (values) => values};
    return {names: labels, logits, probabilities: activations[activation](logits)};
}

// The lines of a text by their scores for a query, the highest first, as far as there is no newer question.
async function rank(bundle, query, text) {
    const mine = (bundle.asked = (bundle.asked ?? 0) + 1);
    const start = performance.now();
    const found = [];
    for (const line of text.split("\n").filter((line) => line.trim())) {
        const outputs = await bundle.session.run(prepare(bundle, [query, line]));
        found.push([outputs[bundle.session.outputNames[0]].data[0], line]);
        await new Promise((done) => setTimeout(done)); // lets the browser read keys
        if (bundle.asked !== mine) break;
    }
    found.sort((a, b) => b[0] - a[0]);
    return {names: found.map((one) => one[1]), logits: found.map((one) => one[0]), milliseconds: performance.now() - start};
}

function prepare({manifest: {inputs}, ort, session, tokenizer}, example) {
    if (inputs.kind === "image") {
        const {data, channels, height, width} = imagePixels(example, inputs);
        return {[session.inputNames[0]]: new ort.Tensor("float32", data, [1, channels, height, width])};
    }
    const columns = textColumns(tokenizer, example, inputs);
    return Object.fromEntries(session.inputNames.map((name) => [name, wholeNumbers(ort, columns[name])]));
}

function wholeNumbers(ort, values) {
    return new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
}

export function softmax(logits) {
    const largest = Math.max(...logits);
    const weights = Array.from(logits, (logit) => Math.exp(logit - largest));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    return weights.map((weight) => weight / total);
}

// ---- Language models

// Yields the continuation of a text as it grows, {text, tokens, milliseconds}, until the model ends it, `limit` tokens are there, or
// no position is left. `choose` takes the logits (vocabulary) of the next token and gives its number.
export async function* continueText({manifest, ort, session, tokenizer}, prompt, {choose, limit = 100}) {
    const {end_tokens: ends, context, cache: shapes, cache_until: until} = manifest.outputs;
    const start = performance.now();
    let encoded = promptTokens(tokenizer, prompt, ends);
    if (!encoded.length) encoded = ends.slice(0, 1); // begins a new document
    if (!encoded.length) throw new Error("expected a text of at least one token, found none. Give it a text.");
    if (encoded.length >= (context ?? Infinity)) {
        throw new Error(`expected a text of fewer than ${context} tokens, found ${encoded.length}`);
    }
    const empty = Object.fromEntries(Object.entries(shapes).map(([name, [heads, size]]) =>
        [name, new ort.Tensor("float32", new Float32Array(0), [1, heads, 0, size])]));
    let cache = empty;
    const tokens = [];
    for (let ids = encoded, total = encoded.length; tokens.length < limit && total <= (context ?? Infinity); total++) {
        const feeds = {input_ids: wholeNumbers(ort, ids), attention_mask: wholeNumbers(ort, Array(total).fill(1)), ...cache};
        const outputs = await session.run(feeds);
        const vocabulary = outputs.logits.dims[2];
        const token = choose(outputs.logits.data.subarray(outputs.logits.data.length - vocabulary));
        if (ends.includes(token)) return;
        cache = Object.fromEntries(Object.keys(shapes).map((name) => [name, outputs[name.replace("past_key_values", "present")]]));
        tokens.push(token);
        ids = [token];
        // As generate.py says: beyond this length the cache is not that of the text.
        if (total === until) [ids, cache] = [[...encoded, ...tokens], empty];
        yield {text: continuation(tokenizer, encoded, tokens), tokens: tokens.length, milliseconds: performance.now() - start};
    }
}

// What tokens add to the text of a prompt: alone, those of SentencePiece would lose their first space.
export function continuation(tokenizer, prompt, tokens) {
    const decode = (ids) => (ids.length ? tokenizer.decode(ids, {skip_special_tokens: true, clean_up_tokenization_spaces: false}) : "");
    return decode([...prompt, ...tokens]).slice(decode(prompt).length);
}

// The tokens of a prompt after what the tokenizer puts before every text.
function promptTokens(tokenizer, prompt, ends) {
    const [whole, plain] = [true, false].map((special) => tokenizer.encode("a", {add_special_tokens: special}).ids);
    const at = whole.findIndex((_, index) => plain.every((token, place) => whole[index + place] === token));
    const begin = plain.length ? whole.slice(0, Math.max(0, at)) : whole.filter((token) => !ends.includes(token));
    return [...begin, ...tokenizer.encode(prompt, {add_special_tokens: false}).ids];
}

// At a temperature of 0 the likeliest token; above, one of the 50 likeliest is drawn.
export function chooseToken(logits, temperature, random) {
    if (temperature === 0) return logits.reduce((best, logit, token) => (logit > logits[best] ? token : best), 0);
    const likely = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a]).slice(0, 50);
    let left = random();
    const probabilities = softmax(likely.map((token) => logits[token] / temperature));
    return likely[probabilities.findIndex((probability) => (left -= probability) < 0)] ?? likely[0];
}

// ---- Answers

// The answers to a question with parts of a context, the likeliest first, as answers.py finds them: names (the answers), their
// probabilities and the logarithms of these (logits), and their spans [start, end] in the context, in UTF-16 units; null for "no answer".
export async function answer({manifest: {inputs, outputs}, ort, session, tokenizer}, [question, context]) {
    const begun = performance.now();
    const asked = tokenizer.encode_text(question), read = tokenizer.encode_text(context);
    const before = finish(tokenizer, asked, ["\0"]).tokens.indexOf("\0");
    const room = inputs.max_length - finish(tokenizer, asked, []).tokens.length;
    if (room <= inputs.overlap) throw new Error("expected a shorter question, which leaves room for the text");
    const found = new Map(), places = tokenPlaces(tokenizer, context, read);
    let none = Infinity;
    for (let from = 0; read.length; from += room - inputs.overlap) {
        const part = read.slice(from, from + room);
        const columns = numbered(tokenizer, finish(tokenizer, asked, part));
        const run = await session.run(Object.fromEntries(session.inputNames.map((name) => [name, wholeNumbers(ort, columns[name])])));
        const logits = [run.start_logits.data, run.end_logits.data];
        const likely = likeliestSpans(...logits, before, before + part.length - 1, outputs.max_answer_tokens);
        none = Math.min(none, likely.none);
        for (const [start, end, score] of likely.spans) {
            const span = places(start - before + from, end - before + from).join();
            found.set(span, Math.max(score, found.get(span) ?? -Infinity));
        }
        if (from + room >= read.length) break;
    }
    const spans = Array.from(found, ([span, score]) => [span.split(",").map(Number), score]).sort((a, b) => b[1] - a[1]).slice(0, 3);
    if (!spans.length || outputs.unanswerable) {
        const place = spans.length && none <= spans[0][1] ? spans.length : 0;
        spans.splice(place, 0, [null, spans.length ? none : 0]);
    }
    const logits = spans.map(([, score]) => score);
    return {
        names: spans.map(([span]) => (span ? context.slice(...span) : "(no answer)")),
        logits,
        probabilities: logits.map(Math.exp),
        spans: spans.map(([span]) => span),
        milliseconds: performance.now() - begun,
    };
}

// The likeliest spans of a window, [first token, last token, log probability], and the log probability that it has none.
export function likeliestSpans(startLogits, endLogits, first, last, longest, count = 3) {
    const places = [0];
    for (let place = first; place <= last; place++) places.push(place);
    const [start, end] = [startLogits, endLogits].map((logits) => {
        const own = places.map((place) => logits[place]), largest = Math.max(...own);
        const total = largest + Math.log(own.reduce((sum, logit) => sum + Math.exp(logit - largest), 0));
        return own.map((logit) => logit - total);
    });
    const spans = [];
    for (let from = 1; from < places.length; from++) {
        for (let to = from; to < Math.min(from + longest, places.length); to++) {
            const score = start[from] + end[to];
            if (spans.length === count && score <= spans[count - 1][2]) continue;
            const place = spans.findIndex((span) => score > span[2]);
            spans.splice(place < 0 ? spans.length : place, 0, [places[from], places[to], score]);
            spans.length = Math.min(spans.length, count);
        }
    }
    return {spans, none: start[0] + end[0]};
}

// A function from the first and last of the tokens of a text to the characters that they stand for. The library of this page does not tell
// these, so the text is cut into words, and a word into the shortest or longest beginning with the tokens before; where none has just these,
// the place is an end of the word.
export function tokenPlaces(tokenizer, text, tokens) {
    const words = Array.from(text.matchAll(/\s*\S+/g), (match) => ({from: match.index, word: match[0], tokens: tokenizer.encode_text(match[0])}));
    if (words.flatMap((one) => one.tokens).join("\0") !== tokens.join("\0")) {
        throw new Error("expected a tokenizer that reads word by word, whose tokens this page can find in a text. Use the bundle's infer.py.");
    }
    const owners = words.flatMap((one) => one.tokens.map((_, place) => [one, place]));
    const beginnings = ({word}) => {
        const lengths = [0];
        for (const character of word) lengths.push(lengths.at(-1) + character.length);
        return lengths;
    };
    const hasTokens = ({word, tokens: own}, length, count) =>
        tokenizer.encode_text(word.slice(0, length)).join("\0") === own.slice(0, count).join("\0");
    return (first, last) => {
        const [one, begin] = owners[first], [other, end] = owners[last];
        const lengths = beginnings(one).filter((length) => hasTokens(one, length, begin));
        const start = one.from + (lengths.length ? lengths.at(-1) : 0);
        const ends = beginnings(other).filter((length) => hasTokens(other, length, end + 1));
        // Of a word that the tokenizer does not know already the first letters are unknown; what makes no token is no part of it.
        while (other.tokens[end] === tokenizer.model.unk_token && ends.length > 1) {
            if (tokenizer.encode_text(other.word.slice(ends.at(-2), ends.at(-1))).length) ends.splice(0, ends.length - 1);
            else ends.pop();
        }
        const stop = other.from + (ends[0] ?? other.word.length);
        const part = text.slice(start, stop);
        const [from, to] = [start + part.length - part.trimStart().length, stop - part.length + part.trimEnd().length];
        // Combining marks belong to the last character.
        return from < to ? [from, to + /^\p{M}*/u.exec(text.slice(to))[0].length] : [from, from];
    };
}

// ---- Texts

// Token ids, mask and types of one or two texts, cut to the model's length together with the special tokens around them.
export function textColumns(tokenizer, texts, settings) {
    let [first, second = null] = texts.map((text) => tokenizer.encode_text(text));
    const frame = finish(tokenizer, [], second && []).tokens.length;
    const lengths = truncatedLengths(first.length, second?.length ?? 0, settings.max_length - frame);
    const left = settings.truncation_side === "left";
    const cut = (tokens, length) => (left ? tokens.slice(tokens.length - length) : tokens.slice(0, length));
    return numbered(tokenizer, finish(tokenizer, cut(first, lengths[0]), second && cut(second, lengths[1])));
}

function numbered(tokenizer, {tokens, token_type_ids: types}) {
    const identify = (token) =>
        tokenizer.added_tokens_map.get(token)?.id ?? tokenizer.token_to_id(token) ?? tokenizer.model.unk_token_id;
    return {input_ids: tokens.map(identify), attention_mask: tokens.map(() => 1), token_type_ids: types ?? tokens.map(() => 0)};
}

function finish(tokenizer, first, second) {
    return tokenizer.post_processor ? tokenizer.post_processor(first, second, true) : {tokens: [...first, ...(second ?? [])]};
}

// How many tokens of each text stay when `room` is left for both: the longer loses first, then both by turns.
export function truncatedLengths(first, second, room) {
    if (first + second <= room) return [first, second];
    const shorter = Math.min(first, second, Math.floor(room / 2));
    return first <= second ? [shorter, room - shorter] : [room - shorter, shorter];
}

// ---- Spans: what spans.py does, with places in UTF-16, as JavaScript counts

// Spans of a text of any length: `text`, `label`, `score`, `start`, `end`.
async function findInText({manifest: {inputs, outputs}, ort, session, tokenizer}, text) {
    const placed = placedTokens(tokenizer, text);
    const {windows, before} = textWindows(tokenizer, placed, inputs.max_length);
    const offsets = [], logits = [];
    for (const {tokens, from, to} of windows) {
        const columns = numbered(tokenizer, finish(tokenizer, tokens.map(({token}) => token), null));
        const feeds = Object.fromEntries(session.inputNames.map((name) => [name, wholeNumbers(ort, columns[name])]));
        const found = (await session.run(feeds))[session.outputNames[0]];
        const labels = outputs.labels.length;
        for (let place = from; place < to; place++) {
            offsets.push([tokens[place].start, tokens[place].end]);
            logits.push(found.data.slice((before + place) * labels, (before + place + 1) * labels));
        }
    }
    return findSpans(text, offsets, logits, outputs.labels);
}

// The windows that overlap, each with its tokens and which of them count, and how many special tokens stand before them.
export function textWindows(tokenizer, placed, maxLength) {
    const mark = "\0";
    const framed = finish(tokenizer, [mark], null).tokens;
    const [room, overlap] = [maxLength - framed.length + 1, Math.floor(maxLength / 4)];
    const windows = [];
    for (let first = 0, last = false; !last; first += room - overlap) {
        last = first + room >= placed.length;
        const tokens = placed.slice(first, first + room);
        const from = first ? Math.floor(overlap / 2) : 0;
        windows.push({tokens, from, to: last ? tokens.length : tokens.length - Math.ceil(overlap / 2)});
    }
    return {windows, before: framed.indexOf(mark)};
}

export function findSpans(text, offsets, logits, labels) {
    const groups = [];
    logits.forEach((values, token) => {
        const probabilities = softmax(values);
        const best = probabilities.indexOf(Math.max(...probabilities));
        const [, prefix, kind] = /^([BI])-(.*)$/s.exec(labels[best]) ?? ["", "I", labels[best]];
        const group = groups.at(-1);
        if (prefix === "I" && group?.kind === kind) {
            group.scores.push(probabilities[best]);
            group.end = offsets[token][1];
        } else {
            groups.push({kind, start: offsets[token][0], end: offsets[token][1], scores: [probabilities[best]]});
        }
    });
    return groups.filter(({kind}) => kind !== "O").map(({kind, start, end, scores}) => {
        while (start < end && /\s/.test(text[start])) start++;
        while (end > start && /\s/.test(text[end - 1])) end--;
        // A combining mark belongs to the character before it.
        if (start < end) end += /^\p{M}*/u.exec(text.slice(end))[0].length;
        const score = scores.reduce((sum, value) => sum + value, 0) / scores.length;
        return {text: text.slice(start, end), label: kind, score, start, end};
    }).filter(({start, end}) => start < end);
}

// The tokens of a text with their places. The library tells nothing of these, so its steps are taken one by one: each character is
// normalized alone to know what became of it, and the pieces of WordPiece are parts of the normalized text.
export function placedTokens(tokenizer, text) {
    const placed = [];
    let offset = 0;
    for (const section of tokenizer.splitter_unnormalized.split(text)) {
        if (tokenizer.added_tokens_map.has(section)) {
            placed.push({token: section, start: offset, end: offset + section.length});
        } else if (section) {
            placed.push(...tokensOfSection(tokenizer, section, offset));
        }
        offset += section.length;
    }
    return placed;
}

function tokensOfSection(tokenizer, section, offset) {
    const normalize = (given) => tokenizer.normalizer?.(given) ?? given;
    const [starts, ends] = [[], []]; // of the character that each unit of the normalized text comes from
    let [place, normalized] = [offset, ""];
    for (const character of section) {
        const units = normalize(character);
        starts.push(...Array(units.length).fill(place));
        place += character.length;
        ends.push(...Array(units.length).fill(place));
        normalized += units;
    }
    const unsupported = () => new Error("this page cannot tell where the tokens of this tokenizer are. Use the bundle's infer.py.");
    if (normalized.length !== normalize(section).length) throw unsupported();
    const placed = [];
    let from = 0;
    for (const piece of normalized ? tokenizer.pre_tokenizer(normalized) : []) {
        from = normalized.indexOf(piece, from);
        const prefix = tokenizer.model.config.continuing_subword_prefix;
        const tokens = tokenizer.model([piece]);
        const isUnknown = tokens.length === 1 && tokens[0] === tokenizer.model.unk_token;
        const lengths = isUnknown ? [piece.length] : tokens.map((token, index) => token.length - (index ? prefix?.length : 0));
        if (from < 0 || lengths.reduce((sum, length) => sum + length, 0) !== piece.length) throw unsupported();
        tokens.forEach((token, index) => {
            placed.push({token, start: starts[from], end: ends[from + lengths[index] - 1]});
            from += lengths[index];
        });
    }
    return placed;
}

// The places of the first tokens as a manifest's probes have them: in code points.
function codePointOffsets(tokenizer, text, count) {
    if (count === undefined) return "";
    const points = [];
    let point = 0;
    for (const character of text) points.push(...Array(character.length).fill(point++));
    points.push(point);
    return placedTokens(tokenizer, text).slice(0, count).map(({start, end}) => `${points[start]}-${points[end]}`).join(" ");
}

// ---- Images

// Raises an error for a file of which a browser gives other pixels than infer.py reads: it keeps 8 of 16 bits.
export function checkImageFile(bytes) {
    const begins = (...expected) => expected.every((byte, place) => bytes[place] === byte);
    const isDeep = begins(0x89, 0x50, 0x4e, 0x47) && bytes[24] === 16;
    if (isDeep) throw new Error("its values have 16 bits, of which a browser reads 8. Use the bundle's infer.py.");
    if (begins(0x49, 0x49, 42) || begins(0x4d, 0x4d, 0, 42)) throw new Error("a TIFF. Use the bundle's infer.py.");
}

// The pixels that a model sees, float32 (channels, height, width), of an image {data: RGBA bytes without transparency, width, height}.
export function imagePixels(image, settings) {
    const {channels = 3, rescale, mean, std} = settings;
    let {data, width, height} = withoutAlpha(image, channels === 1);
    if (settings.resize) {
        const size = resizedSize(width, height, settings.resize);
        data = resample(data, width, height, ...size, settings.resample);
        [width, height] = size;
    }
    if (settings.crop) {
        data = centerCrop(data, width, height, settings.crop.width, settings.crop.height);
        ({width, height} = settings.crop);
    }
    const planes = new Float32Array(channels * width * height);
    for (let channel = 0; channel < channels; channel++) {
        for (let index = 0; index < width * height; index++) {
            let value = data[3 * index + channel];
            if (rescale !== null) value = Math.fround(value * rescale);
            // Each step in float32, as NumPy takes it.
            if (mean) value = Math.fround(value - Math.fround(mean[channel])) / Math.fround(std[channel]);
            planes[channel * width * height + index] = value;
        }
    }
    return {data: planes, channels, width, height};
}

// RGB bytes; of a grey image all three are Pillow's lightness.
function withoutAlpha({data, width, height}, isGrey) {
    const rgb = new Uint8Array(3 * width * height);
    for (let from = 0, to = 0; to < rgb.length; from += 4) {
        const grey = (19595 * data[from] + 38470 * data[from + 1] + 7471 * data[from + 2] + 0x8000) >> 16;
        for (let channel = 0; channel < 3; channel++) rgb[to++] = isGrey ? grey : data[from + channel];
    }
    return {data: rgb, width, height};
}

export function resizedSize(width, height, resize) {
    const short = resize.shortest_edge;
    if (short === undefined) return [resize.width, resize.height];
    return width <= height ? [short, Math.trunc((short * height) / width)] : [Math.trunc((short * width) / height), short];
}

function centerCrop(data, columns, rows, width, height) {
    // Black where the image is smaller; an uneven border is wider above and on the left.
    const left = Math.floor((columns - width) / 2);
    const top = Math.floor((rows - height) / 2);
    const cropped = new Uint8Array(3 * width * height);
    for (let y = Math.max(0, -top); y < Math.min(height, rows - top); y++) {
        const [from, to] = [Math.max(0, -left), Math.min(width, columns - left)];
        const line = 3 * ((y + top) * columns + left);
        cropped.set(data.subarray(line + 3 * from, line + 3 * to), 3 * (y * width + from));
    }
    return cropped;
}

// Pillow's filters by its numbers: the reach in source pixels, and the weight at a distance.
const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));
const FILTERS = {
    1: [3, (x) => (-3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0)], // Lanczos
    2: [1, (x) => Math.max(0, 1 - Math.abs(x))], // bilinear
    3: [2, bicubic],
    4: [0.5, (x) => (-0.5 < x && x <= 0.5 ? 1 : 0)], // box
    5: [1, (x) => (Math.abs(x) >= 1 ? 0 : sinc(x) * (0.54 + 0.46 * Math.cos(x * Math.PI)))], // Hamming
};

function bicubic(distance) {
    const [a, x] = [-0.5, Math.abs(distance)];
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

// RGB bytes in another size, as Image.resize of Pillow 13 makes them: along one axis, then along the other, each rounded to bytes.
export function resample(data, width, height, newWidth, newHeight, filter) {
    if (filter === 0) return nearest(data, width, height, newWidth, newHeight);
    let [columns, rows] = [width, height];
    const alongRows = () => {
        if (newWidth !== columns) data = resampleAxis(data, newWidth, rows, columns, [3, 3 * columns], [3, 3 * newWidth], filter);
        columns = newWidth;
    };
    const alongColumns = () => {
        if (newHeight !== rows) data = resampleAxis(data, newHeight, columns, rows, [3 * columns, 3], [3 * columns, 3], filter);
        rows = newHeight;
    };
    // Since 13 the order depends on which of them makes the image smaller.
    const columnsFirst = height - newHeight > Math.max(0, 2 * (width - newWidth));
    for (const pass of columnsFirst ? [alongColumns, alongRows] : [alongRows, alongColumns]) pass();
    return data;
}

const BITS = 22; // weights are whole numbers of 2^-22, so that a sum of bytes fits in 32 bits

// `source` and `target` are the steps to the next pixel along the axis and across it.
function resampleAxis(data, newLength, lines, length, source, target, filter) {
    const [reach, weigh] = FILTERS[filter];
    const scale = length / newLength;
    const stretch = Math.max(scale, 1); // a smaller image averages over more pixels
    const result = new Uint8Array(3 * newLength * lines);
    for (let index = 0; index < newLength; index++) {
        const center = (index + 0.5) * scale;
        const first = Math.max(0, Math.trunc(center - reach * stretch + 0.5));
        const end = Math.min(length, Math.trunc(center + reach * stretch + 0.5));
        const weights = [];
        for (let x = first; x < end; x++) weights.push(weigh((x - center + 0.5) * (1 / stretch)));
        const total = weights.reduce((sum, weight) => sum + weight, 0);
        const whole = weights.map((weight) => {
            const scaled = (total === 0 ? weight : weight / total) * 2 ** BITS;
            return Math.trunc(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
        });
        for (let line = 0; line < lines; line++) {
            for (let channel = 0; channel < 3; channel++) {
                let sum = 2 ** (BITS - 1);
                let from = first * source[0] + line * source[1] + channel;
                for (const weight of whole) {
                    sum += data[from] * weight;
                    from += source[0];
                }
                result[index * target[0] + line * target[1] + channel] = Math.min(255, Math.max(0, sum >> BITS));
            }
        }
    }
    return result;
}

function nearest(data, width, height, newWidth, newHeight) {
    // Added up step by step: rounding decides which neighbour is met halfway.
    const positions = (length, newLength) => {
        const found = [];
        let position = (length / newLength) * 0.5;
        for (let index = 0; index < newLength; index++, position += length / newLength) found.push(Math.trunc(position));
        return found;
    };
    const columns = positions(width, newWidth);
    const result = new Uint8Array(3 * newWidth * newHeight);
    positions(height, newHeight).forEach((row, y) => columns.forEach((column, x) => {
        const from = 3 * (row * width + column);
        result.set(data.subarray(from, from + 3), 3 * (y * newWidth + x));
    }));
    return result;
}
