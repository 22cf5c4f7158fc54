// What works only with a script: `/` focuses the search, and snippets can be copied.
"use strict";

document.addEventListener("keydown", (event) => {
  const writes = event.target.closest("input, textarea, select");
  if (event.key === "/" && !writes && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    document.getElementById("q").focus();
  }
});

const said = document.createElement("div");
said.setAttribute("role", "status");
said.className = "visually-hidden";
document.body.append(said);

for (const box of document.querySelectorAll(".snippet > div")) {
  const text = box.querySelector("pre");
  const button = document.createElement("button");
  button.type = "button";
  button.className = "icon";
  button.textContent = "Copy";
  button.setAttribute("aria-label", `Copy: ${text.getAttribute("aria-label")}`);
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text.textContent);
    said.textContent = "Copied";
  });
  box.append(button);
}
