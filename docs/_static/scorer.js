// Order of what the search finds: pages that are called what was asked for first, lessons before
// the names of the library.
const asked = (new URLSearchParams(window.location.search).get("q") || "")
  .toLowerCase()
  .split(/\s+/)
  .filter(Boolean);

// the values of Sphinx itself, but for `score`
var Scorer = {
  score: (result) => {
    const [page, title, , , value, , kind] = result;
    const words = title.toLowerCase().split(/[^\p{L}\p{N}-]+/u);
    const named = asked.length > 0 && asked.every((word) => words.includes(word));
    const lesson = page.endsWith("1_derive") ? 1 : 0;
    return kind === "object" ? value - 10 : value + lesson + (named ? 20 : 0);
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
