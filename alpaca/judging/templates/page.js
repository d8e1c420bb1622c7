() => {
  // A key clicks its button. A key that is held down is ignored, and so is one within 0.3 s of a new pair, before
  // anybody can have read it.
  const keys = {ArrowLeft: "first", 1: "first", ArrowRight: "second", 2: "second", 3: "tie", 4: "skip", u: "undo"};
  document.addEventListener("keydown", (event) => {
    const choice = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!choice || event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
    if (event.target.closest?.("input, textarea, select, [contenteditable]")) return;
    const button = document.getElementById("choose-" + choice);
    if (!button?.checkVisibility() || performance.now() - (window.pairShown ?? 0) < 300) return;
    event.preventDefault();
    button.click();
  });
}
