// Command benchplots draws what `waystage bench` has measured: for each version of PostgreSQL one SVG with the ratio of every
// comparison, its spread over the rounds, and its bar.
//
//	benchplots bench.json FOLDER
//
// It is a program of its own so that the server does not carry a plotting library.
package main

import (
	"encoding/json"
	"fmt"
	"image/color"
	"os"
	"path/filepath"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// figure is what is drawn of an entry of bench.json.
type figure struct {
	Name   string   `json:"name"`
	Ratio  *float64 `json:"ratio"`
	Bar    *float64 `json:"bar"`
	AtMost bool     `json:"at_most"`
	Spread *struct {
		Min float64 `json:"min"`
		Max float64 `json:"max"`
	} `json:"spread"`
	On struct {
		PostgreSQL string `json:"postgresql"`
		Cores      int    `json:"cores"`
	} `json:"on"`
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: benchplots bench.json FOLDER")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "benchplots:", err)
		os.Exit(1)
	}
}

func run(file, dir string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var all []figure
	if err := json.Unmarshal(data, &all); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var versions []string
	of := map[string][]figure{}
	for _, f := range all {
		if f.Ratio == nil || *f.Ratio <= 0 { // a logarithm is drawn
			continue
		}
		if of[f.On.PostgreSQL] == nil {
			versions = append(versions, f.On.PostgreSQL)
		}
		of[f.On.PostgreSQL] = append(of[f.On.PostgreSQL], f)
	}
	for _, v := range versions {
		major, _, _ := strings.Cut(v, ".")
		if err := ratios(v, of[v], filepath.Join(dir, "ratios-"+major+".svg")); err != nil {
			return err
		}
	}
	return nil
}

// points are places with a spread around them.
type points struct {
	plotter.XYs
	plotter.XErrors
}

// ratios draws one line for each figure, the first on top.
func ratios(version string, figures []figure, path string) error {
	p := plot.New()
	p.Title.Text = fmt.Sprintf("Ratio to the baseline, PostgreSQL %s, %d cores (rate: higher is better; ≤: lower)", version, figures[0].On.Cores)
	p.X.Label.Text = "ratio, median and spread of the rounds; + is the bar"
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	var names []string
	var got points
	var bars plotter.XYs
	for i := len(figures) - 1; i >= 0; i-- {
		f, y := figures[i], float64(len(names))
		name := f.Name
		if f.AtMost {
			name += " ≤"
		}
		names = append(names, name)
		low, high := 0.0, 0.0
		if f.Spread != nil {
			low, high = *f.Ratio-f.Spread.Min, f.Spread.Max-*f.Ratio
		}
		got.XYs = append(got.XYs, plotter.XY{X: *f.Ratio, Y: y})
		got.XErrors = append(got.XErrors, struct{ Low, High float64 }{low, high})
		if f.Bar != nil {
			bars = append(bars, plotter.XY{X: *f.Bar, Y: y})
		}
	}
	p.NominalY(names...)
	measured, err := plotter.NewScatter(got.XYs)
	if err != nil {
		return err
	}
	measured.GlyphStyle = draw.GlyphStyle{Color: color.RGBA{R: 0x1f, G: 0x5f, B: 0xa8, A: 0xff}, Radius: vg.Points(4), Shape: draw.CircleGlyph{}}
	spread, err := plotter.NewXErrorBars(got)
	if err != nil {
		return err
	}
	p.Add(plotter.NewGrid(), spread, measured)
	p.Legend.Add("measured", measured)
	if len(bars) > 0 {
		asked, err := plotter.NewScatter(bars)
		if err != nil {
			return err
		}
		asked.GlyphStyle = draw.GlyphStyle{Color: color.RGBA{R: 0xc0, G: 0x30, B: 0x20, A: 0xff}, Radius: vg.Points(7), Shape: draw.PlusGlyph{}}
		p.Add(asked)
		p.Legend.Add("bar", asked)
	}
	p.Legend.Top = true
	return p.Save(22*vg.Centimeter, vg.Length(3+len(names))*vg.Centimeter, path)
}
