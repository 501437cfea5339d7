/* Every command and every block of code can be copied by a press. */
document.addEventListener("DOMContentLoaded", () => {
  for (const code of document.querySelectorAll("code.command, div.highlight-bash pre, div.cell_input pre")) {
    const button = document.createElement("button");
    button.className = "copy";
    button.type = "button";
    button.textContent = "copy";
    button.setAttribute("aria-label", "Copy this code");
    const text = code.innerText;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "selected";
      }
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    });
    code.after(button);
  }
});
