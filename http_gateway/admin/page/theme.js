"use strict";
/* Before the first paint: the appearance that the user has chosen, where it is not the system's. */
try {
  const chosen = localStorage.getItem("quartet.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  /* storage is off: the system's appearance it is */
}
