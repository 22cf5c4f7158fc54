// What works only with a script: `/` focuses the search, searches have tidy addresses, and snippets and digests can be copied.
"use strict";

document.addEventListener("keydown", (event) => {
  const writes = event.target.closest("input, textarea, select");
  if (event.key === "/" && !writes && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    document.getElementById("q").focus();
  }
});

// Browsers and htmx ask for a form's fields here, before they make its address of them.
document.addEventListener("formdata", (event) => {
  if (event.target.getAttribute("action") !== "/search") return;
  for (const [name, value] of [...event.formData]) if (value === "") event.formData.delete(name);
});

const said = document.createElement("div");
said.setAttribute("role", "status");
said.className = "visually-hidden";
document.body.append(said);

for (const box of document.querySelectorAll(".snippet > div, [data-copy]")) {
  const text = box.querySelector("pre, code");
  const button = document.createElement("button");
  button.type = "button";
  button.className = "icon";
  button.textContent = "Copy";
  button.setAttribute("aria-label", `Copy: ${box.dataset.copy ?? text.getAttribute("aria-label")}`);
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text.textContent);
    said.textContent = "Copied";
  });
  box.append(button);
}

// A link to a page with a form opens that form in a dialog. Without scripts, or if that fails, it is followed.
document.addEventListener("click", async (event) => {
  const link = event.target.closest("a[data-dialog]");
  if (!link || event.defaultPrevented || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  const answer = await fetch(link.href, { headers: { Accept: "text/html" } }).catch(() => null);
  const main = answer?.ok && new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("main");
  if (!main) {
    location.assign(link.href);
    return;
  }
  const dialog = document.createElement("dialog");
  main.querySelector(".crumbs")?.remove();
  dialog.append(...main.children);
  for (const one of dialog.querySelectorAll("[id]")) one.id = `dialog-${one.id}`; // the page has its own
  for (const one of dialog.querySelectorAll("[aria-labelledby]")) {
    one.setAttribute("aria-labelledby", `dialog-${one.getAttribute("aria-labelledby")}`);
  }
  const title = dialog.querySelector("h1");
  title.id = "dialog-title";
  dialog.setAttribute("aria-labelledby", title.id);
  dialog.addEventListener("click", (inside) => {
    if (!inside.target.closest("a[data-leave]")) return;
    inside.preventDefault();
    dialog.close();
  });
  dialog.addEventListener("close", () => {
    dialog.remove();
    link.focus();
  });
  document.body.append(dialog);
  dialog.showModal();
});
