/** Small helpers for elements of the page. */

/** Return the element with an id. */
export const byId = (id) => document.getElementById(id);

/** Return a new element with properties and children. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
