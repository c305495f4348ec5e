// What this browser keeps for the page. Where it may keep nothing, that is remembered until the page is left.

const remembered = {};

// area: "localStorage", or "sessionStorage" for this tab alone. null where nothing is kept.
export function kept(area, name) {
  try {
    return globalThis[area].getItem(name);
  } catch {
    return remembered[name] ?? null;
  }
}

// null forgets it.
export function keep(area, name, value) {
  try {
    value === null ? globalThis[area].removeItem(name) : globalThis[area].setItem(name, value);
  } catch {
    remembered[name] = value;
  }
}
