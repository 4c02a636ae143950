"""From noise to a sample: one file for each method, registered under the name it is chosen by.

    @register("sampler", "ddim", DdimOptions)
    def sample(denoise, schedule, x, times, noise, *, eta) -> x0

`times` are float64 [S + 1], falling, on the CPU, as `times.visited` lays them; a last 0 is the
clean
image. What depends on times only is computed before the first step, and the device is never
waited for. `plan`, where a sampler has one, says which times suit it.
"""
