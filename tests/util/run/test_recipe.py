from util.run.recipe import Recipe


def test_the_rate_rises_linearly_and_falls_to_its_minimum():
    recipe = Recipe(lr=1.0, min_lr=0.1, lr_schedule="cosine", warmup_epochs=2, epochs=4, grad_clip=3.0)
    assert [round(recipe.learning_rate(epoch), 6) for epoch in (0, 1, 2, 3, 4)] == [0.0, 0.5, 1.0, 0.55, 0.1]
