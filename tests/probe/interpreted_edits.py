"""Edits on Triton through its interpreter: a script for `interpret.py` that prints how many cells it has held."""

if __name__ == "__main__":
    from edit_cells import check, pairwise

    cells = [cell for cell in pairwise() if cell[0] != "s4d"]
    print(sum(check(cell, "triton") is not None for cell in cells[::20]))
