"use strict";
// Shows the rows that every filter lets through. Without a script all rows are there.
const filters = document.getElementById("filters");
const count = document.getElementById("count");
const sections = [...document.querySelectorAll("section[data-task]")];

function wanted(row, chosen) {
  const { change, right, slices } = row.dataset;
  if (chosen.change === "wrong" ? right === "yes" : chosen.change && change !== chosen.change) return false;
  if (chosen.slice && !slices.split("\n").includes(chosen.slice)) return false;
  return !chosen.text || row.textContent.toLowerCase().includes(chosen.text);
}

function apply() {
  const chosen = {};
  for (const field of filters.querySelectorAll("[name]")) chosen[field.name] = field.value;
  chosen.text = chosen.text.trim().toLowerCase();
  let shown = 0;
  let all = 0;
  for (const section of sections) {
    section.hidden = chosen.task !== "" && section.dataset.task !== chosen.task;
    for (const row of section.querySelectorAll("tr.row")) {
      row.hidden = !wanted(row, chosen);
      all += 1;
      if (!section.hidden && !row.hidden) shown += 1;
    }
  }
  count.textContent = `${shown} of ${all} rows`;
}

filters.addEventListener("input", apply);
apply();
